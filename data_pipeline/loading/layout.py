"""The layout of a pack: the rows, places and sizes of its views, known before anything is read.

All views of a pack are laid out at once: numpy's calls cost more than the work on one view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.loading.recipe import PackRecipe, ViewRecipe
from data_pipeline.plan.random_draws import hashes


class Place(NamedTuple):
    """The rows of a pack that a view fills, and the patches of its grid that go there."""

    rows: slice
    y: NDArray[np.int64]
    x: NDArray[np.int64]


@dataclass(frozen=True)
class PackLayout:
    """The fields of a `PackedBatch` that follow from its recipe; C tokens, I images at most."""

    places: list[Place]
    """The place of each view of each image, in order."""
    coords: NDArray[np.int32]
    """[C, 2]."""
    grids: NDArray[np.int32]
    """[I, 2]."""
    sample_ids: NDArray[np.int64]
    """[I]."""
    lengths: NDArray[np.int64]
    """[I + 1]."""
    view_of: NDArray[np.int64] | None
    """[I]."""
    local: NDArray[np.bool_] | None
    """[I]."""


def pack_layout(recipe: PackRecipe) -> PackLayout:
    """Return the layout of a pack."""
    limit, prefix = recipe.max_images, recipe.prefix_tokens
    views = [view for image in recipe.images for view in image.views]
    used, kept = len(views), kept_patches(views)
    lengths = np.zeros(limit + 1, dtype=np.int64)
    lengths[:used] = [prefix + view.keep for view in views]
    ends = lengths[:used].cumsum()
    lengths[limit] = recipe.token_budget - lengths.sum()
    grids = np.ones((limit, 2), dtype=np.int32)
    grids[:used] = np.array([view.grid for view in views], dtype=np.int32).reshape(used, 2)
    keeps = lengths[:used] - prefix
    flat = np.concatenate([np.empty(0, dtype=np.int64), *kept])
    y, x = np.divmod(flat, np.repeat(grids[:used, 1].astype(np.int64), keeps))
    rows = np.arange(len(flat)) + np.repeat(prefix * np.arange(1, used + 1), keeps)
    coords = np.full((recipe.token_budget, 2), -1, dtype=np.int32)
    coords[rows, 0], coords[rows, 1] = y, x
    sample_ids = np.full(limit, -1, dtype=np.int64)
    sample_ids[:used] = [image.sample_id for image in recipe.images for _ in image.views]
    view_of = local = None
    if recipe.views > 1:
        view_of = np.full(limit, -1, dtype=np.int64)
        view_of[:used] = np.arange(used) // recipe.views * recipe.views
    if recipe.has_local:
        local = np.zeros(limit, dtype=np.bool_)
        local[:used] = [view.local for view in views]
    return PackLayout(
        _places(ends, keeps, y, x), coords, grids, sample_ids, lengths, view_of, local
    )


def _places(
    ends: NDArray[np.int64], keeps: NDArray[np.int64], y: NDArray[np.int64], x: NDArray[np.int64]
) -> list[Place]:
    places, done = list[Place](), 0
    for end, keep in zip(ends.tolist(), keeps.tolist(), strict=True):
        places.append(Place(slice(end - keep, end), y[done : done + keep], x[done : done + keep]))
        done += keep
    return places


def kept_patches(views: Sequence[ViewRecipe]) -> list[NDArray[np.int64]]:
    """Return the indices of the kept patches of each view, [keep]: ascending, a uniform subset."""
    totals = [view.grid[0] * view.grid[1] for view in views]
    drawn = [total if view.keep < total else 0 for view, total in zip(views, totals, strict=True)]
    starts = np.cumsum([0, *drawn])
    keys = np.array([view.keep_key for view in views], dtype=np.uint64)
    counters = np.arange(starts[-1]) - np.repeat(starts[:-1], drawn)
    words = hashes(np.repeat(keys, drawn), counters)
    return [
        np.sort(np.argpartition(words[start : start + draws], view.keep)[: view.keep])
        if draws
        else np.arange(total)
        for view, total, start, draws in zip(views, totals, starts.tolist(), drawn, strict=False)
    ]
