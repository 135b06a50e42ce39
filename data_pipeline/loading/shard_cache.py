"""A bounded local cache of whole remote shards, filled ahead in the order of the plan.

The plan knows which shards a rank reads next, so nothing is guessed: what is wanted soonest is
fetched first, and what is wanted last, or never again, makes room. Downloads run in processes of
their own; executors wait for the file to appear under its name.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import BinaryIO

from data_pipeline.shards.atomic_file import remove_leftovers, write_atomically
from data_pipeline.shards.manifest import Shard
from data_pipeline.shards.parallel import SpawnPool
from data_pipeline.shards.remote import download

_FETCHERS = 2


def failure_path(path: Path) -> Path:
    """Return the file that says why the download to `path` failed."""
    return path.with_suffix(".failed")


def check_cache_size(shards: Sequence[Shard], lanes: int, window_shards: int, gb: float) -> None:
    """Refuse a cache that cannot hold what `lanes` read at the same time.

    Each lane shuffles the samples of `window_shards` shards together, so all of them must be there.

    Raises:
        ValueError: with the size that is needed and the size that there is.
    """
    sizes = sorted((shard.nbytes for shard in shards), reverse=True)
    needed = sum(sizes) if lanes * window_shards >= len(sizes) else lanes * window_shards * sizes[0]
    if needed > gb * 1e9:
        raise ValueError(
            f"data.cache_gb is {gb:g}, but {lanes} lanes here x {window_shards} shards (data."
            f"window_shards) x {sizes[0] / 1e9:.3g} GB need {needed / 1e9:.3g} GB: raise "
            "data.cache_gb, start more ranks, or make smaller shards"
        )


class ShardCache:
    """The cache of one rank.

    Args:
        folder: where the files lie; whole shards of an earlier start are used again. While
            another process has it (an evaluation beside a run), a folder with a number is taken.
        limit_bytes: the files never take more, downloads in progress included.
        deadline_s: how long a download may go without progress.
    """

    def __init__(self, folder: Path, limit_bytes: int, deadline_s: float) -> None:
        self._limit, self._deadline_s = limit_bytes, deadline_s
        self._folder, self._lock = _claim(folder)
        folder = self._folder
        remove_leftovers(folder)
        for path in folder.glob("*.failed"):
            path.unlink(missing_ok=True)
        self._sizes = {path: path.stat().st_size for path in folder.glob("*.tar")}
        """Bytes of every file that is there or on its way."""
        self._downloads: dict[Path, Future[None]] = {}
        self._pins: Counter[Path] = Counter()
        self._pool = SpawnPool(_FETCHERS)
        self._evict(keep=frozenset(), room=0)

    def want(self, shards: Iterable[Shard]) -> None:
        """Fetch shards, the one that is read soonest first, as far as the limit allows.

        Whatever is neither in the list nor pinned may make room.
        """
        ordered = {self.path(shard): shard for shard in shards}
        ahead: set[Path] = set()
        for path, shard in ordered.items():
            ahead.add(path)
            if path in self._sizes:
                continue
            if not self._evict(keep=ahead, room=shard.nbytes):
                return  # what comes later must not take the room of what comes first
            self._sizes[path] = shard.nbytes
            failure_path(path).unlink(missing_ok=True)
            future = self._pool.submit(download, shard.path, path, shard.nbytes, self._deadline_s)
            self._downloads[path] = future
            future.add_done_callback(partial(_note_failure, path))

    def locate(self, shard: Shard) -> Path | None:
        """Return where a shard is, or will appear; None if there was no room for it."""
        path = self.path(shard)
        return path if path in self._sizes else None

    def path(self, shard: Shard) -> Path:
        """Return the file of a shard: other contents of the same URL have another one."""
        facts = f"{shard.path} {shard.nbytes} {shard.mtime_ns}"
        return self._folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.tar"

    def pin(self, paths: Iterable[Path]) -> None:
        """Keep files until `unpin`: a pack that reads them is on its way."""
        self._pins.update(paths)

    def unpin(self, paths: Iterable[Path]) -> None:
        """Take back one `pin`."""
        self._pins.subtract(paths)

    @property
    def nbytes(self) -> int:
        """Bytes of the files, downloads in progress counted as whole."""
        return sum(self._sizes.values())

    def close(self) -> None:
        """Stop the downloads; whole files stay for the next start."""
        self._pool.end()
        self._lock.close()

    def _evict(self, keep: set[Path] | frozenset[Path], room: int) -> bool:
        """Delete files until `room` bytes are free; return False if that is not possible."""
        for path in list(self._sizes):
            if self.nbytes + room <= self._limit:
                break
            on_its_way = path in self._downloads and not self._downloads[path].done()
            if path in keep or self._pins[path] > 0 or on_its_way:
                continue
            path.unlink(missing_ok=True)
            failure_path(path).unlink(missing_ok=True)
            del self._sizes[path]
            self._downloads.pop(path, None)
        return self.nbytes + room <= self._limit


def _claim(folder: Path) -> tuple[Path, BinaryIO]:
    """Return the first of ``folder``, ``folder-1``, ... that no other process uses, locked."""
    for number in itertools.count():
        candidate = folder if number == 0 else folder.with_name(f"{folder.name}-{number}")
        candidate.mkdir(parents=True, exist_ok=True)
        lock = (candidate / "lock").open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        return candidate, lock
    raise AssertionError("itertools.count() has no end")


def _note_failure(path: Path, done: Future[None]) -> None:
    """Tell the executors that wait for a file that it will not come."""
    if done.cancelled() or (error := done.exception()) is None:
        return
    with write_atomically(failure_path(path)) as stream:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        stream.write(f"{text} ({type(error).__name__})".encode())
