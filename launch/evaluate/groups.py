"""Break the scores of an evaluation down by class, aspect ratio and size of the images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards.manifest import Manifest
from zeta.probes.image_scores import means_over
from zeta.probes.rows import Columns

_ASPECTS = (1 / 2, 3 / 4, 4 / 3, 2.0)
_ASPECT_NAMES = ("below 1:2", "1:2 to 3:4", "3:4 to 4:3", "4:3 to 2:1", "above 2:1")
"""Ratios of width to height; a square is in the middle."""
_SIDES = (64, 128, 256, 512, 1024)
_SIDE_NAMES = ("below 64", "64 to 128", "128 to 256", "256 to 512", "512 to 1024", "above 1024")
"""Square root of the area of the stored image, in pixels."""


def scores_by_class(rows: Columns, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return number of images and mean scores of each class that has images, by name."""
    return _scores_by(rows, rows["label"], names)


def scores_by_aspect(rows: Columns, manifest: Manifest) -> dict[str, dict[str, float]]:
    """Return number of images and mean scores by the ratio of width to height."""
    samples = manifest.samples[rows["sample_id"]]
    ratios = samples["width"].astype(np.float64) / samples["height"]
    return _scores_by(rows, _bins(ratios, _ASPECTS), _ASPECT_NAMES)


def scores_by_side(rows: Columns, manifest: Manifest) -> dict[str, dict[str, float]]:
    """Return number of images and mean scores by the size of the images before any resizing."""
    samples = manifest.samples[rows["sample_id"]]
    sides = np.sqrt(samples["width"].astype(np.float64) * samples["height"])
    return _scores_by(rows, _bins(sides, _SIDES), _SIDE_NAMES)


def _bins(values: NDArray[np.float64], edges: Sequence[float]) -> NDArray[np.int64]:
    """Return the bin of each value; an edge belongs to the bin nearer to the middle."""
    low = np.searchsorted(edges, values, side="right")
    high = np.searchsorted(edges, values, side="left")
    middle = len(edges) / 2
    return np.where(np.abs(low - middle) <= np.abs(high - middle), low, high).astype(np.int64)


def _scores_by(
    rows: Columns, group_of: NDArray[np.int64], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    groups = {}
    for group in np.unique(group_of).tolist():
        chosen = group_of == group
        groups[names[group]] = {"images": int(chosen.sum())} | means_over(rows, chosen)
    return groups
