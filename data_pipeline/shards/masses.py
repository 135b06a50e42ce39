"""What each shard holds, counted in one pass over the manifest and cached by its fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards.atomic_file import write_atomically
from data_pipeline.shards.manifest import Manifest, SampleFlag
from data_pipeline.shards.sample_rows import release_pages

_CHUNK = 1 << 19
_CACHED_FROM = 2_000_000
"""Samples from which counting takes long enough to be worth a file."""
_VERSION = 1


@dataclass(frozen=True)
class ShardMasses:
    """Per shard, [S] each."""

    tokens: NDArray[np.float64]
    """Patches of its usable images at the median draw, before dropping."""
    usable: NDArray[np.float64]
    bad: NDArray[np.float64]
    """Samples that the index flagged."""
    unlabelled: NDArray[np.float64]
    """Samples without the class, or caption, that the objective needs; bad ones not again."""
    shrunk: NDArray[np.float64]
    """Usable images with more tokens than a pack holds, at the median draw."""


class Needs(NamedTuple):
    """What a sample must have to be planned."""

    label: bool = False
    """One class."""
    label_list: bool = False
    """Any number of classes, also none, as long as it is known."""
    caption: bool = False


def usable_samples(samples: NDArray[np.void], needs: Needs) -> NDArray[np.bool_]:
    """Return which rows of the manifest may be planned: [n]."""
    usable = (samples["flags"] & SampleFlag.BAD) == 0
    if needs.label:
        usable &= samples["label"] >= 0
    for needed, flag in (
        (needs.label_list, SampleFlag.LABELLED),
        (needs.caption, SampleFlag.CAPTIONED),
    ):
        if needed:
            usable &= (samples["flags"] & flag) != 0
    return np.asarray(usable)


def shard_masses(
    manifest: Manifest,
    count_patches: Callable[[NDArray[np.void]], tuple[NDArray[np.int64], NDArray[np.bool_]]],
    *,
    needs: Needs,
    rules: Mapping[str, object],
    cache: Path | None = None,
) -> ShardMasses:
    """Return the masses of a manifest's shards, from the cache where it has them.

    Args:
        manifest: read in chunks, so that memory does not grow with it.
        count_patches: gives the patches of some rows, and which were shrunk to fit.
        needs: samples without these cannot be used.
        rules: all that `count_patches` depends on; part of the name in the cache.
        cache: folder of the cache; None is `$XDG_CACHE_HOME/zeta` or `~/.cache/zeta`, used for
            large manifests only.
    """
    if cache is None and len(manifest.samples) < _CACHED_FROM:
        return ShardMasses(*_count(manifest, count_patches, needs))
    facts = [_VERSION, manifest.fingerprint, len(manifest.samples), needs, dict(rules)]
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    path = (cache or _cache_folder()) / f"shards-{name}.npy"
    known = _read(path, (5, len(manifest.shards)))
    if known is None:
        known = _count(manifest, count_patches, needs)
        _write(path, known)
    return ShardMasses(*known)


def _count(
    manifest: Manifest,
    count_patches: Callable[[NDArray[np.void]], tuple[NDArray[np.int64], NDArray[np.bool_]]],
    needs: Needs,
) -> NDArray[np.float64]:
    sums = np.zeros((5, len(manifest.shards)))
    for start in range(0, len(manifest.samples), _CHUNK):
        samples = np.array(manifest.samples[start : start + _CHUNK])
        shards = manifest.shard_of(np.arange(start, start + len(samples)))
        bad = (samples["flags"] & SampleFlag.BAD) != 0
        usable = usable_samples(samples, needs)
        patches, shrunk = count_patches(samples[usable])
        columns = (
            (shards[usable], patches),
            (shards[usable], None),
            (shards[bad], None),
            (shards[~usable & ~bad], None),
            (shards[usable], shrunk),
        )
        first, stop = int(shards[0]), int(shards[-1]) + 1
        for row, (where, weights) in zip(sums, columns, strict=True):
            row[first:stop] += np.bincount(where - first, weights=weights, minlength=stop - first)
        release_pages(manifest.samples)
    return sums


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zeta"


def _read(path: Path, shape: tuple[int, int]) -> NDArray[np.float64] | None:
    try:
        known = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return known if known.shape == shape and known.dtype == np.float64 else None


def _write(path: Path, sums: NDArray[np.float64]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as stream:
            np.save(stream, sums)
    except OSError:
        return  # a cache that cannot be written costs the next start a pass over the manifest
