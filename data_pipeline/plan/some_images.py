"""Choose some of the labelled images of large shards, the same ones on every rank and start.

The choice is a pure function of the manifest. It reads the manifest in chunks and keeps only as
many rows as are chosen, so that its memory does not grow with the shards.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from data_pipeline.plan.arrays import Ints
from data_pipeline.plan.random_draws import Draw, stream_key, uniforms
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.masses import Needs, usable_samples
from data_pipeline.shards.sample_rows import release_pages

_CHUNK = 1 << 17
_NEEDS = Needs(label=True)


def class_counts(manifest: Manifest) -> Ints:
    """Return the number of usable images of each class, [highest label + 1]."""
    counts = np.zeros(manifest.highest_label + 1, dtype=np.int64)
    for start in range(0, len(manifest.samples), _CHUNK):
        rows = manifest.samples[start : start + _CHUNK]
        counts += np.bincount(rows["label"][usable_samples(rows, _NEEDS)], minlength=len(counts))
    release_pages(manifest.samples)
    return counts


def some_images(manifest: Manifest, most: int, *, by_class: bool) -> Manifest:
    """Return a manifest of at most `most` usable images with a class, drawn without order.

    Args:
        manifest: the images.
        most: number of images, at least 1.
        by_class: whether classes get equally many, as far as they have them; else each image is as
            likely as any other.
    """
    chosen, labels, draws = _empty()
    for start in range(0, len(manifest.samples), _CHUNK):
        rows = manifest.samples[start : start + _CHUNK]
        usable = usable_samples(rows, _NEEDS)
        ids = start + np.flatnonzero(usable)
        key = np.uint64(stream_key(Draw.SUBSET))
        chosen = np.concatenate([chosen, ids])
        labels = np.concatenate([labels, rows["label"][usable].astype(np.int64)])
        draws = np.concatenate([draws, uniforms(key, ids)])
        # A row beyond `most` stays there whatever follows: more rows only move it back.
        first = np.lexsort((draws, _ranks(labels, draws) if by_class else draws))[:most]
        chosen, labels, draws = chosen[first], labels[first], draws[first]
    release_pages(manifest.samples)
    return _only(manifest, np.sort(chosen))


def _empty() -> tuple[Ints, Ints, np.ndarray]:
    return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)


def _ranks(labels: Ints, draws: np.ndarray) -> Ints:
    """Return the place of each row among those of its class, in order of the draws; all are [n]."""
    order = np.lexsort((draws, labels))
    sorted_labels = labels[order]
    firsts = np.searchsorted(sorted_labels, sorted_labels, side="left")
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[order] = np.arange(len(labels)) - firsts
    return ranks


def _only(manifest: Manifest, ids: Ints) -> Manifest:
    """Return the manifest of the rows `ids`, which ascend; its shards are those that hold them."""
    if len(ids) == len(manifest.samples):
        return manifest
    counts = np.bincount(manifest.shard_of(ids), minlength=len(manifest.shards)).tolist()
    firsts = np.cumsum([0, *counts]).tolist()
    shards = [
        replace(shard, first=first, count=count)
        for shard, first, count in zip(manifest.shards, firsts[:-1], counts, strict=True)
        if count
    ]
    digest = hashlib.sha256(manifest.fingerprint.encode() + ids.astype("<i8").tobytes())
    return replace(
        manifest,
        shards=tuple(shards),
        samples=manifest.samples[ids],
        checksums=manifest.known_checksums[ids],
        fingerprint=digest.hexdigest(),
        older_fingerprint="",
        content_digest="",
        sources=(),
    )
