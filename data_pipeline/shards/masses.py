"""The masses of shards: counts of one pass over the manifest, cached by its fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards.atomic_file import write_atomically
from data_pipeline.shards.manifest import Manifest, SampleFlag
from data_pipeline.shards.sample_rows import release_pages

_CHUNK = 1 << 17
_MOST_THREADS = 16
_CACHED_FROM = 2_000_000
"""Number of samples above which counting takes long enough to be worth a cache file."""
_VERSION = 1


@dataclass(frozen=True)
class ShardMasses:
    """The counts of every shard; arrays of [S]."""

    tokens: NDArray[np.float64]
    """Number of patches of usable images at the median draw, before dropping."""
    usable: NDArray[np.float64]
    """Number of usable images."""
    bad: NDArray[np.float64]
    """Number of samples that the index flagged as bad."""
    unlabelled: NDArray[np.float64]
    """Number of other samples without the class or caption that the objective needs."""
    shrunk: NDArray[np.float64]
    """Number of usable images that exceed a pack at the median draw."""


class Needs(NamedTuple):
    """The targets that a sample must have to be planned."""

    label: bool = False
    """Exactly one class."""
    label_list: bool = False
    """A list of classes, which may be empty."""
    caption: bool = False
    """A caption."""


def usable_samples(samples: NDArray[np.void], needs: Needs) -> NDArray[np.bool_]:
    """Return which of the manifest rows `samples` [n] may be planned, [n]."""
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
    """Return the masses of the shards of a manifest, from the cache if it has them.

    Args:
        manifest: the manifest, which is read in chunks so that memory does not grow with it.
        count_patches: function of rows [n] that returns their number of patches [n], and which
            images were shrunk to fit [n].
        needs: targets without which a sample is not usable.
        rules: everything that `count_patches` depends on; part of the name in the cache.
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
    """Return [5, S]: the columns of `ShardMasses`, counted by as many threads as there are cores.

    They are whole numbers, so the order of the sums does not matter.
    """
    sums = np.zeros((5, len(manifest.shards)))
    starts = range(0, len(manifest.samples), _CHUNK)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(min(_MOST_THREADS, cores or 1)) as threads:
        count = partial(_count_chunk, manifest, count_patches, needs)
        for first, counts in threads.map(count, starts):
            sums[:, first : first + counts.shape[1]] += counts
    return sums


def _count_chunk(
    manifest: Manifest,
    count_patches: Callable[[NDArray[np.void]], tuple[NDArray[np.int64], NDArray[np.bool_]]],
    needs: Needs,
    start: int,
) -> tuple[int, NDArray[np.float64]]:
    """Return the first shard of a chunk of rows, and the counts of its shards, [5, shards]."""
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
    first, size = int(shards[0]), int(shards[-1] - shards[0]) + 1
    counts = [np.bincount(where - first, weights, minlength=size) for where, weights in columns]
    release_pages(manifest.samples)
    return first, np.array(counts, dtype=np.float64)


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
        return  # without the cache, the next run counts again
