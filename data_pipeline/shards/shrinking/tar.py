"""A copy of a tar shard with smaller images; every other byte of its entries stays."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import BinaryIO

from data_pipeline.shards.images.header import ImageError, ReadAt
from data_pipeline.shards.images.smaller import Shrinking, suffix_of_copy
from data_pipeline.shards.known_checksums import compare
from data_pipeline.shards.sample import SampleError, pick_image, suffix_of
from data_pipeline.shards.shrinking.report import ShardReport
from data_pipeline.shards.shrinking.sample import counted_copy
from data_pipeline.shards.tar_reader import BLOCK, Member, iter_samples

NO_CHECKSUMS: Mapping[tuple[int, int], int] = MappingProxyType({})
_RECORD = 20 * BLOCK
_CHUNK = 2**24
_MAX_NBYTES = 2**32 - 1  # of a sample that is read at all, as in the index


def write_shrunk(
    read_at: ReadAt,
    nbytes: int,
    shard: str,
    stream: BinaryIO,
    rule: Shrinking,
    known: Mapping[tuple[int, int], int] = NO_CHECKSUMS,
) -> ShardReport:
    """Write the archive of `nbytes` behind `read_at` to `stream`, with smaller images.

    Entries that belong to no sample are kept too. A run of members without an image, or with two
    of one suffix, is kept whatever the rule, because it may hold what belongs to another.

    Raises:
        TarError: the archive is malformed or cut; it is named `shard`.
        DamagedSample: the bytes of a sample do not have their checksum, `known` by (offset, bytes).
    """
    report = ShardReport(PurePosixPath(shard).name, dropped=rule.drop_unreadable)
    written = 0
    for key, members in iter_samples(read_at, nbytes, shard):
        compare(read_at, key, members, shard, known)
        copy = _copy(read_at, key, members, rule, report) if key else None
        if isinstance(copy, ImageError) and rule.drop_unreadable:
            continue
        for member in members:
            if isinstance(copy, tuple) and member is copy[0]:
                entry = _entry(read_at(member.offset, member.data_offset - member.offset), *copy)
                written += stream.write(entry)
                continue
            for offset in range(member.offset, member.end, _CHUNK):
                written += stream.write(read_at(offset, min(_CHUNK, member.end - offset)))
    stream.write(bytes(-(-(written + 2 * BLOCK) // _RECORD) * _RECORD - written))
    return report


def _copy(
    read_at: ReadAt, key: str, members: list[Member], rule: Shrinking, report: ShardReport
) -> tuple[Member, bytes] | ImageError | None:
    """Return the image of a sample and its smaller copy, None if it stays, or why it is unread."""
    try:
        image = _image(members)
        if image.nbytes > _MAX_NBYTES:
            raise SampleError(f"image of {image.nbytes} bytes; at most 4 GiB are read")
        copy = counted_copy(read_at(image.data_offset, image.nbytes), rule, report)
    except (SampleError, ImageError) as error:
        report.refuse(key, str(error))
        return error if isinstance(error, ImageError) else None
    return None if copy is None else (image, copy)


def _image(members: list[Member]) -> Member:
    """Return the image that is trained on; SampleError without one."""
    by_suffix: dict[str, Member] = {}
    for member in members:
        suffix = suffix_of(member.name)
        if suffix in by_suffix:
            raise SampleError(f"two members .{suffix} under one key")
        by_suffix[suffix] = member
    return by_suffix[pick_image(by_suffix)]


def _entry(header: bytes, member: Member, content: bytes) -> bytes:
    """Return the tar entry of a copy: the header of its original with another size and suffix.

    `tarfile` reads and writes it, names that are not UTF-8 included.
    """
    try:
        with tarfile.open(
            fileobj=io.BytesIO(header), mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as tar:
            info = tar.next()
    except tarfile.TarError:  # `data_pipeline.shards.tar_reader` is more patient
        info = None
    info = info or tarfile.TarInfo(member.name)
    folder, slash, name = info.name.rpartition("/")
    key, dot, suffix = name.partition(".")
    info.name = f"{folder}{slash}{key}{dot}{suffix_of_copy(suffix)}"
    info.size = len(content)
    # What is said of the original's name and size is written again where it is needed.
    info.pax_headers = {
        name: fact for name, fact in info.pax_headers.items() if name not in ("path", "size")
    }
    padded = content + bytes(-len(content) % BLOCK)
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + padded
