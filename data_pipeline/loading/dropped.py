"""The dropped patches of a pack, where an objective asked for whole images (`data.drop.keep`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.loading.layout import Place
from data_pipeline.loading.recipe import PackRecipe, ViewRecipe


class DroppedPatches:
    """The patches of a pack that are dropped, and go beside it (`data.drop.keep`)."""

    def __init__(self, recipe: PackRecipe, kept: Sequence[Place]) -> None:
        """Give the dropped patches of each view their rows; `kept` has the places of the others."""
        views = [view for image in recipe.images for view in image.views]
        count = sum(view.dropped for view in views)
        self._patches = np.zeros((count, recipe.patch_size**2 * 3), dtype=np.uint8)
        self._coords = np.zeros((count, 2), dtype=np.int32)
        self._image = np.zeros(count, dtype=np.int64)
        self._places: list[Place] = []
        for index, (view, place) in enumerate(zip(views, kept, strict=True)):
            self._add(index, view, place)

    def _add(self, index: int, view: ViewRecipe, kept: Place) -> None:
        left = np.ones(view.grid, dtype=np.bool_)
        left[kept.y, kept.x] = False
        y, x = np.nonzero(left) if view.drop_keep else np.empty((2, 0), dtype=np.int64)
        first = self._places[-1].rows.stop if self._places else 0
        rows = slice(first, first + len(y))
        self._coords[rows, 0], self._coords[rows, 1], self._image[rows] = y, x, index
        self._places.append(Place(rows, y, x))

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
