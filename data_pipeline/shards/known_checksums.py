"""The checksums that an index has of the samples of a shard, found by the place of their bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards.checksum import UNKNOWN, DamagedSample, checksum_at
from data_pipeline.shards.folder import ShardFolder
from data_pipeline.shards.images.header import ReadAt
from data_pipeline.shards.manifest_files import read_entries
from data_pipeline.shards.tar_reader import Member

KnownChecksums = NDArray[np.uint64]
"""Offset, bytes and checksum of each sample of a shard, [n, 3]."""


def known_checksums(folder: ShardFolder, names: Sequence[str]) -> dict[str, KnownChecksums]:
    """Return what the index of a folder knows of the shards `names`, by name.

    Shards that it does not hold, or that have another size since, are left out.

    Raises:
        ValueError: the index is damaged.
        OSError: a shard cannot be looked up.
    """
    index = read_entries(folder.index)
    if index is None:
        return {}
    places, sizes = index.slices(), {entry.name: entry.nbytes for entry in index.entries}
    named, known = [name for name in names if name in places], dict[str, KnownChecksums]()
    for name, (nbytes, _) in zip(named, folder.stat(named), strict=True):
        if nbytes == sizes[name]:
            rows, checksums = index.samples[places[name]], index.checksums[places[name]]
            columns = (rows["offset"], rows["nbytes"], checksums)
            known[name] = np.stack(columns, axis=1, dtype=np.uint64)
    return known


def by_place(known: KnownChecksums | None) -> Mapping[tuple[int, int], int]:
    """Return the checksum of each sample by (offset, bytes)."""
    return {} if known is None else {(row[0], row[1]): row[2] for row in known.tolist()}


def compare(
    read_at: ReadAt,
    key: str,
    members: Sequence[Member],
    shard: str,
    known: Mapping[tuple[int, int], int],
) -> None:
    """Read a sample that is going to be copied: its copy gets a checksum of its own.

    Raises:
        DamagedSample: the sample does not have the checksum of its place in `known`.
    """
    place = members[0].offset, members[-1].end - members[0].offset
    if place in known and known[place] not in (UNKNOWN, checksum_at(read_at, *place)):
        raise DamagedSample(*place, key, shard)
