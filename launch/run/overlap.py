"""Find shards that two sets have in common, however they are spelled, linked or copied."""

from __future__ import annotations

from collections import defaultdict

from data_pipeline.shards.folder import file_mark
from data_pipeline.shards.manifest import Manifest, Shard
from data_pipeline.shards.remote import is_remote, read_range
from data_pipeline.shards.tar_reader import ShardFile

_PROBE = 2**16


def shared_shards(manifest: Manifest, other: Manifest) -> list[str]:
    """Return the paths of those shards of `manifest` that are shards of `other` too.

    Files are compared, not names. A copy, or the same shard behind a URL, is known by its size, by
    equal rows of the index and by the bytes at the beginning and in the middle.

    Raises:
        OSError: a shard that may be a copy cannot be read.
    """
    marks = {file_mark(shard.path) for shard in other.shards}
    alike: dict[tuple[int, int], list[Shard]] = defaultdict(list)
    for shard in other.shards:
        alike[shard.nbytes, shard.count].append(shard)
    return [
        shard.path
        for shard in manifest.shards
        if file_mark(shard.path) in marks
        or any(
            _rows(manifest, shard) == _rows(other, candidate) and _bytes(shard) == _bytes(candidate)
            for candidate in alike[shard.nbytes, shard.count]
        )
    ]


def _rows(manifest: Manifest, shard: Shard) -> bytes:
    return bytes(manifest.samples[shard.first : shard.first + shard.count].tobytes())


def _bytes(shard: Shard) -> list[bytes]:
    """Return a block from the beginning and one from the middle of a shard."""
    count = min(_PROBE, shard.nbytes // 2)
    if is_remote(shard.path):
        return [read_range(shard.path, at, count) for at in (0, shard.nbytes // 2)]
    with ShardFile(shard.path) as stream:
        return [stream.read_at(at, count) for at in (0, shard.nbytes // 2)]
