"""Remote shards through fsspec (s3://, gs://, http:// ...): stat, ranges, whole-shard download.

Transient failures (429, 5xx, resets, short answers, timeouts) are retried with backoff; permanent
ones (404, 403) fail at once. Errors name the URL and the byte.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from data_pipeline.shards.atomic_file import write_atomically
from data_pipeline.shards.retry import PermanentError, with_retries
from data_pipeline.shards.stores import RemoteError, open_store, translated

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Result = TypeVar("Result")

CHUNK = 2**24
"""Bytes that one request of a download asks for."""
DEADLINE_S = 120.0
"""Seconds after which retries of a failing call end."""
_STAMPS = (
    "ETag",
    "etag",
    "Content-MD5",
    "md5Hash",
    "generation",
    "Last-Modified",
    "LastModified",
    "mtime",
    "created",
)


class RemoteStat(NamedTuple):
    """The size and stamp of an object in a store."""

    nbytes: int
    stamp: int
    """Number of 60 bits: a hash of its ETag (or checksum, or date of change)."""


def is_remote(path: str) -> bool:
    """Return whether a path is a URL."""
    return "://" in path


def stat(url: str, deadline_s: float = DEADLINE_S) -> RemoteStat:
    """Return the size and stamp of an object.

    Raises:
        OSError: the object does not exist, or the store does not answer within the deadline.
    """
    try:
        info = with_retries(lambda: _call(url, "", lambda store: store.info(url)), deadline_s)
    except PermanentError as error:
        if error.errno != errno.ENOENT:
            # The answer to a HEAD has no words; that to a GET says what is wrong with the key.
            read_range(url, 0, 1, deadline_s)
        raise
    nbytes = info.get("size")
    if not isinstance(nbytes, int):
        raise PermanentError(errno.EINVAL, "the server does not report its size", url)
    mark = next((str(info[name]) for name in _STAMPS if info.get(name)), "")
    return RemoteStat(nbytes, int(hashlib.sha256(mark.encode()).hexdigest()[:15], 16))


def expand_glob(url: str, deadline_s: float = DEADLINE_S) -> list[str]:
    """Return the sorted URLs that a pattern matches; the store must be able to list."""
    folder, _, _ = url.rpartition("/")
    named = "*" not in folder and "[" not in folder

    def find(store: AbstractFileSystem) -> list[str]:
        # The spelling of a given folder is kept, because it leads to the index.
        return sorted(
            f"{folder}/{name.rpartition('/')[2]}" if named else str(store.unstrip_protocol(name))
            for name in store.glob(url)
        )

    return with_retries(lambda: _call(url, "", find), deadline_s)


def read_range(url: str, offset: int, nbytes: int, deadline_s: float = DEADLINE_S) -> bytes:
    """Return exactly `nbytes` bytes at `offset`.

    Raises:
        OSError: the bytes did not arrive within the deadline; names URL and byte.
    """
    return with_retries(lambda: _read_once(url, offset, nbytes), deadline_s)


def download(url: str, path: Path, nbytes: int, deadline_s: float = DEADLINE_S) -> None:
    """Fetch a whole object of `nbytes` to `path`, which appears when it is complete.

    When a request fails, the bytes that have arrived are kept and only the rest is requested again.
    The deadline counts from the last progress.

    Raises:
        OSError: no bytes arrived within the deadline; names URL and byte.
    """
    with write_atomically(path) as stream:
        for piece in _pieces(url, nbytes, deadline_s):
            stream.write(piece)


def _pieces(url: str, nbytes: int, deadline_s: float) -> Iterator[bytes]:
    for offset in range(0, nbytes, CHUNK):
        yield read_range(url, offset, min(CHUNK, nbytes - offset), deadline_s)


class RemoteShard:
    """A remote shard that is read forwards in large blocks, for an index pass."""

    def __init__(self, url: str, deadline_s: float = DEADLINE_S) -> None:
        self._url, self._deadline_s = url, deadline_s
        self.nbytes, self.mtime_ns = stat(url, deadline_s)
        self._blocks: dict[int, bytes] = {}

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """Return the bytes at `offset`; fewer than `nbytes` only at the end of the shard."""
        end = min(offset + nbytes, self.nbytes)
        data = b"".join(
            self._block(number)[max(offset - number * CHUNK, 0) : end - number * CHUNK]
            for number in range(offset // CHUNK, -(-end // CHUNK))
        )
        return data

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            start = number * CHUNK
            count = min(CHUNK, self.nbytes - start)
            while len(self._blocks) > 1:
                del self._blocks[min(self._blocks)]
            self._blocks[number] = read_range(self._url, start, count, self._deadline_s)
        return self._blocks[number]

    def __enter__(self) -> RemoteShard:
        return self

    def __exit__(self, *error: object) -> None:
        self._blocks.clear()


def _read_once(url: str, offset: int, nbytes: int) -> bytes:
    def read(store: AbstractFileSystem) -> bytes:
        return bytes(store.cat_file(url, start=offset, end=offset + nbytes))

    data = _call(url, f", reading at byte {offset}", read)
    if len(data) > nbytes:  # a server without support for ranges sends everything
        data = data[offset : offset + nbytes]
    if len(data) < nbytes:
        what = f"{len(data)} of {nbytes} bytes arrived, reading at byte {offset}"
        raise RemoteError(errno.EIO, what, url)
    return data


def _call(url: str, at: str, function: Callable[[AbstractFileSystem], Result]) -> Result:
    """Call `function` on the file system of `url`; its errors become `OSError`s that say `at`."""
    store = open_store(url)
    try:
        return function(store)
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # the client of every store has its own errors
        raise translated(error, url, at) from error
