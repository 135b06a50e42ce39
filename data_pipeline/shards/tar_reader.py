"""Reading tar shards by their 512-byte headers: members, samples, and one sample by offset.

This is not `tarfile`, because an index pass over 100 kB images is bound by header parsing, and
because every malformed archive must end in one error that names the shard and the byte. It reads
ustar, PAX (path, size) and GNU (long names, base-256 sizes) archives, as specified in POSIX.1-2017
pax and the GNU tar manual.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

from data_pipeline.shards.checksum import UNKNOWN, DamagedSample, checksum
from data_pipeline.shards.images.header import ReadAt
from data_pipeline.shards.sample import Sample, split_name

BLOCK = 512
_ZEROS = bytes(BLOCK)
_MAX_EXTENDED = 2**20  # bytes of a PAX or long-name header; real ones have a few hundred
_LONGEST_SIZE = 4000  # digits; Python refuses to read numbers of more than 4300
_CHUNK = 2**20
_COMPRESSED = (
    b"\x1f\x8b",  # gzip
    b"\xfd7zXZ\0",
    b"BZh",
    b"\x28\xb5\x2f\xfd",  # zstd
    b"\x04\x22\x4d\x18",  # lz4
    b"PK\x03\x04",  # zip
    b"7z\xbc\xaf\x27\x1c",
)
"""First bytes of compressed files."""
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)  # Linux


class TarError(ValueError):
    """The error for a shard that is not a whole tar archive; it names shard and byte."""

    def __init__(self, shard: str, offset: int, what: str) -> None:
        super().__init__(f"{shard}: {what} (at byte {offset})")
        self.shard, self.offset, self.what = shard, offset, what

    def __reduce__(self) -> tuple[type[TarError], tuple[str, int, str]]:
        return TarError, (self.shard, self.offset, self.what)


class Member(NamedTuple):
    """One entry of an archive."""

    name: str
    offset: int
    """Byte of its first header, extended headers included."""
    data_offset: int
    """First byte of its content."""
    nbytes: int
    """Bytes of its content, without padding."""
    regular: bool
    """True for a regular file: not a folder, link, device or sparse file."""

    @property
    def end(self) -> int:
        """Byte after the content and its padding."""
        return self.data_offset + -(-self.nbytes // BLOCK) * BLOCK


class ShardFile:
    """A local shard that is read by position; threads may share it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self._descriptor)
        self.nbytes, self.mtime_ns = status.st_size, status.st_mtime_ns

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """Return the bytes at `offset`; fewer than `nbytes` only at the end of the file."""
        data = os.pread(self._descriptor, nbytes, offset)
        while 0 < len(data) < nbytes and offset + len(data) < self.nbytes:
            more = os.pread(self._descriptor, nbytes - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def forget(self, offset: int, nbytes: int) -> None:
        """Drop the bytes from the page cache, where the system can: the next read is of storage."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def read_cached_into(self, buffer: memoryview, offset: int) -> bool:
        """Fill `buffer` from `offset` on; return whether all bytes were in the page cache.

        Raises:
            OSError: no byte is cached, or the file system does not support the question.
        """
        return os.preadv(self._descriptor, [buffer], offset, _NOWAIT) == len(buffer)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)


Stamp = tuple[int, int]
"""(bytes, mtime in ns) of a shard."""


def read_sample(
    path: str,
    offset: int,
    nbytes: int,
    stamp: Stamp | None = None,
    known: int = UNKNOWN,
    again: bool = False,
) -> Sample:
    """Return the sample that the manifest has at `offset`, of `nbytes` bytes.

    Args:
        path: the shard.
        offset, nbytes: place of the sample in it.
        stamp: size and mtime that the shard must have.
        known: checksum that the bytes must have, unless it is `UNKNOWN`.
        again: drop what memory holds of the bytes, and read them from storage.

    Raises:
        TarError: the shard does not have the sample there, or no longer has its `stamp`.
        DamagedSample: the bytes have another checksum.
        OSError: the shard cannot be read. Both errors name shard and byte.
    """
    try:
        with ShardFile(path) as shard:
            _check_stamp(shard, offset, stamp)
            if again:
                shard.forget(offset, nbytes)
            data = shard.read_at(offset, nbytes)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, reading at byte {offset}", path) from error
    if len(data) < nbytes:
        raise TarError(path, offset + len(data), "the shard ends inside a sample")
    return parse_sample(data, shard=path, offset=offset, known=known)


def read_cached_sample(
    shard: ShardFile,
    offset: int,
    buffer: memoryview,
    stamp: Stamp | None = None,
    known: int = UNKNOWN,
) -> Sample | None:
    """Return the sample like `read_sample`, through `buffer`, if the page cache has all of it.

    Otherwise return None, or raise `OSError`; never wait for storage.
    """
    if not _NOWAIT:
        return None
    _check_stamp(shard, offset, stamp)
    if not shard.read_cached_into(buffer, offset):
        return None
    return parse_sample(buffer, shard=shard.path, offset=offset, known=known)


def _check_stamp(shard: ShardFile, offset: int, stamp: Stamp | None) -> None:
    if stamp is not None and (shard.nbytes, shard.mtime_ns) != stamp:
        raise TarError(shard.path, offset, "the shard changed since it was indexed")


def parse_sample(
    data: bytes | memoryview, *, shard: str, offset: int, known: int = UNKNOWN
) -> Sample:
    """Return the sample in `data`: all its tar entries, read at `offset` of the shard.

    Raises:
        TarError: these are no whole tar entries.
        DamagedSample: `known` is not `UNKNOWN`, and not their checksum.
    """
    if known != UNKNOWN and checksum(data) != known:
        raise DamagedSample(offset, len(data), _first_key(data, shard))
    key, members = "", {}
    try:
        for member in _walk(lambda at, count: bytes(data[at : at + count]), len(data), shard):
            split = split_name(member.name) if member.regular else None
            if split is not None:
                key = split[0]
                content = data[member.data_offset : member.data_offset + member.nbytes]
                members[split[1]] = bytes(content)
    except TarError as error:
        raise TarError(shard, offset + error.offset, error.what) from None
    return Sample(key, members)


def _first_key(data: bytes | memoryview, shard: str) -> str:
    """Return the key in the first entry of damaged bytes; "" if it cannot be read."""
    try:
        for member in _walk(lambda at, count: bytes(data[at : at + count]), len(data), shard):
            split = split_name(member.name)
            return split[0] if split is not None else ""
    except TarError:
        pass
    return ""


def iter_samples(read_at: ReadAt, nbytes: int, shard: str) -> Iterator[tuple[str, list[Member]]]:
    """Yield (key, members) of each run of consecutive members that share a key.

    Each entry that belongs to no sample (a folder, a link, a name without an extension) comes alone
    under the key "".

    Raises:
        TarError: see `iter_members`.
    """
    key, members = "", list[Member]()
    for member in iter_members(read_at, nbytes, shard):
        split = split_name(member.name) if member.regular else None
        if split is None:
            yield "", [member]
            continue
        if split[0] != key and members:
            yield key, members
            members = []
        key = split[0]
        members.append(member)
    if members:
        yield key, members


def iter_members(read_at: ReadAt, nbytes: int, shard: str) -> Iterator[Member]:
    """Yield the entries of a whole archive of `nbytes`, reading only its headers.

    Raises:
        TarError: the archive is malformed, truncated (even between two entries: without the
            end-of-archive marker nobody knows what is missing) or followed by other data.
    """
    start = read_at(0, BLOCK)
    if start.startswith(_COMPRESSED) and not (len(start) == BLOCK and _checksum_holds(start)):
        what = "the shard is compressed; samples are read at any place: unpack it to a plain .tar"
        raise TarError(shard, 0, what)
    end = 0
    for member in _walk(read_at, nbytes, shard):
        end = member.end
        yield member
    if read_at(end, BLOCK) != _ZEROS:
        what = "the shard is cut: there is no end-of-archive marker"
        if nbytes == 0:
            what = "empty file; copy or write the shard again, or remove it"
        raise TarError(shard, end, what)
    for offset in range(end, nbytes, _CHUNK):
        if read_at(offset, min(_CHUNK, nbytes - offset)).strip(b"\0"):
            raise TarError(shard, offset, "data after the end-of-archive marker (tars joined?)")


def _walk(read_at: ReadAt, nbytes: int, shard: str) -> Iterator[Member]:
    """Yield entries up to a zero block or the end of the data."""
    offset = first = 0
    extended: dict[str, str] = {}
    while offset < nbytes:
        header = read_at(offset, BLOCK)
        if header == _ZEROS:
            break
        if len(header) < BLOCK:
            raise TarError(shard, offset, "the shard is cut inside a tar header")
        if not _checksum_holds(header):
            raise TarError(shard, offset, "this is not a tar header")
        kind, size = header[156:157], _number(header[124:136])
        if "size" in extended:
            size = _decimal(extended["size"])
        if kind not in _WITHOUT_DATA and not 0 <= size <= nbytes - offset - BLOCK:
            what = "negative or unreadable size" if size < 0 else "the shard is cut inside an entry"
            raise TarError(shard, offset, what)
        if kind in _EXTENDED:
            if size > _MAX_EXTENDED:
                raise TarError(shard, offset, f"extended header of {size} bytes")
            _extend(extended, kind, read_at(offset + BLOCK, size), shard, offset)
            offset += BLOCK + -(-size // BLOCK) * BLOCK
            continue
        if kind == b"S":
            raise TarError(shard, offset, "GNU sparse entries are not supported")
        name = extended.get("path") or _name(header)
        regular = kind in _REGULAR and not name.endswith("/") and "sparse" not in extended
        member = Member(name, first, offset + BLOCK, 0 if kind in _WITHOUT_DATA else size, regular)
        yield member
        offset = first = member.end
        extended = {}
    if offset != first:
        raise TarError(shard, offset, "an extended header without its entry")


_REGULAR = frozenset({b"0", b"\0", b"7"})
_WITHOUT_DATA = frozenset({b"1", b"2", b"3", b"4", b"5", b"6"})
_EXTENDED = frozenset({b"x", b"X", b"g", b"L", b"K"})


def _extend(extended: dict[str, str], kind: bytes, content: bytes, shard: str, offset: int) -> None:
    """Store the facts of an extended header about the next entry in `extended`."""
    if kind == b"L":
        extended["path"] = _text(content)
    elif kind == b"K":
        return
    else:
        records = _pax_records(content, shard, offset)
        if kind == b"g" and records.keys() & {"path", "size"}:
            raise TarError(shard, offset, "a global PAX header sets path or size")
        if kind != b"g":
            extended.update(records)


def _pax_records(content: bytes, shard: str, offset: int) -> dict[str, str]:
    """Parse "LENGTH KEY=VALUE\\n" records; keep path and size, and mark sparse files."""
    records, position = dict[str, str](), 0
    while position < len(content) and content[position] != 0:
        space = content.find(b" ", position, position + 10)
        digits = content[position:space] if space > 0 else b""
        end = position + int(digits) if digits.isdigit() else -1
        key, equals, value = content[space + 1 : max(end - 1, 0)].partition(b"=")
        if not space < end <= len(content) or not equals or content[end - 1 : end] != b"\n":
            raise TarError(shard, offset, "malformed PAX header")
        if key == b"path" or (key == b"size" and value.isdigit()):
            records[key.decode()] = _text(value)
        elif key.startswith(b"GNU.sparse."):
            records["sparse"] = ""
        position = end
    return records


def _checksum_holds(header: bytes) -> bool:
    stored = _number(header[148:156])
    # The low half of an Adler-32 is one more than the sum of the bytes, modulo 65521: 50 times as
    # fast as adding 512 bytes in Python.
    rest = header[:148] + b"        " + header[156:]
    if (stored + 1) % 65521 == zlib.adler32(rest) & 0xFFFF and 0 <= stored <= 512 * 255:
        return True
    # Some old tars summed signed bytes.
    return stored == sum(rest) - 256 * sum(byte > 127 for byte in rest)


def _number(field: bytes) -> int:
    """Return an octal or base-256 number; -1 if it is neither or negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    try:
        return int(digits, 8) if b"_" not in digits else -1
    except ValueError:
        return -1 if digits else 0


def _decimal(text: str) -> int:
    """Return the number in a PAX record; -1 if it is none, or larger than any file."""
    if not text.isascii() or not text.isdigit() or len(text) > _LONGEST_SIZE:
        return -1
    return int(text)


def _name(header: bytes) -> str:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        return f"{_text(header[345:500])}/{name}"
    return name


def _text(field: bytes) -> str:
    # Bytes that are not UTF-8 stay distinct and printable.
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")
