"""The dropped patches of a pack, where an objective asked for whole images (`data.drop.keep`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.loading.recipe import PackRecipe, ViewRecipe


class _Rows(NamedTuple):
    """The rows that an image's dropped patches have, and where in the image these lie."""

    rows: slice
    y: NDArray[np.int64]
    x: NDArray[np.int64]


class DroppedPatches:
    """The patches of a pack that are dropped, and go beside it (`data.drop.keep`)."""

    def __init__(self, recipe: PackRecipe) -> None:
        count = sum(view.dropped for image in recipe.images for view in image.views)
        self._patches = np.zeros((count, recipe.patch_size**2 * 3), dtype=np.uint8)
        self._coords = np.zeros((count, 2), dtype=np.int32)
        self._image = np.zeros(count, dtype=np.int64)
        self._places: list[_Rows] = []
        self._used = 0

    def add(self, index: int, view: ViewRecipe, kept: NDArray[np.int64]) -> None:
        """Give the dropped patches of image `index` of the pack their rows; in order of images."""
        left = np.ones(view.grid[0] * view.grid[1], dtype=np.bool_)
        left[kept] = False
        rest = np.flatnonzero(left) if view.drop_keep else np.empty(0, dtype=np.int64)
        y, x = np.divmod(rest, view.grid[1])
        rows = slice(self._used, self._used + len(rest))
        self._coords[rows, 0], self._coords[rows, 1], self._image[rows] = y, x, index
        self._places.append(_Rows(rows, y, x))
        self._used = rows.stop

    def fill(self, index: int, lines: NDArray[np.void]) -> None:
        """Copy the dropped patches of image `index` from its lines (see `patch_lines`)."""
        place = self._places[index]
        if place.rows.stop > place.rows.start:
            self._patches[place.rows].view(lines.dtype)[:] = lines[place.y, place.x]

    def clear(self, first: int, stop: int) -> None:
        """Put zeros into the images `first` to `stop` - 1, which cannot be used."""
        if stop > first:
            self._patches[self._places[first].rows.start : self._places[stop - 1].rows.stop] = 0

    def fields(self) -> dict[str, Any]:
        """Return the fields of `PackedBatch` that hold them."""
        return {
            "dropped_patches": torch.from_numpy(self._patches),
            "dropped_coords": torch.from_numpy(self._coords),
            "dropped_image": torch.from_numpy(self._image),
        }
