"""The patches of a pack: each view is written to its rows as soon as it is decoded.

Its pixels are still in the processor's caches then, and would not be once others were decoded. Only
images that are mixed wait for one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.loading.decode import patch_lines
from data_pipeline.loading.dropped import DroppedPatches
from data_pipeline.loading.layout import Place
from data_pipeline.loading.mix import mix_rows, own_share
from data_pipeline.loading.recipe import PackRecipe


class PackPatches:
    """The patches of a pack, in its memory, and the dropped ones where they are wanted.

    Args:
        recipe: the recipe of the pack.
        places: the place of each of its views.
        patches: [token budget, p * p * 3] uint8, not yet written.
    """

    def __init__(
        self, recipe: PackRecipe, places: Sequence[Place], patches: NDArray[np.uint8]
    ) -> None:
        self._side, self._prefix = recipe.patch_size, recipe.prefix_tokens
        self._places, self._patches = places, patches
        self._dropped = DroppedPatches(recipe, places) if recipe.drop_keep else None
        patches[places[-1].rows.stop if places else 0 :] = 0

    def put(self, row: int, pixels: NDArray[np.uint8]) -> None:
        """Write the patches of a view, and zeros for its prefix tokens."""
        place, lines = self._places[row], patch_lines(pixels, self._side)
        self._patches[place.rows.start - self._prefix : place.rows.start] = 0
        into = self._patches[place.rows].view(lines.dtype)
        if len(into) == lines.shape[0] * lines.shape[1]:
            into.reshape(lines.shape)[:] = lines  # straight, without a copy in between
        else:
            into[:] = lines[place.y, place.x]
        if self._dropped is not None:
            self._dropped.fill(row, lines)

    def clear(self, first: int, end: int) -> None:
        """Put zeros into the rows of views `first` to `end` - 1."""
        tokens = slice(
            self._places[first].rows.start - self._prefix, self._places[end - 1].rows.stop
        )
        self._patches[tokens] = 0
        if self._dropped is not None:
            self._dropped.clear(first, end)

    def finish(self) -> dict[str, Any]:
        """Return the fields of `PackedBatch` that hold dropped patches, if there are any."""
        return {} if self._dropped is None else self._dropped.fields()


class MixedPatches:
    """The patches of a pack whose images may each show a part of the next one.

    Pixels are kept until all are there.

    Args:
        recipe: the recipe of the pack.
        places: the place of each of its views.
        patches: where they are written at last.
    """

    def __init__(self, recipe: PackRecipe, places: Sequence[Place], patches: PackPatches) -> None:
        self._recipe, self._places, self._patches = recipe, places, patches
        self._pictures: list[NDArray[np.uint8] | None] = [None] * len(places)

    def put(self, row: int, pixels: NDArray[np.uint8]) -> None:
        """Keep the pixels of a view."""
        self._pictures[row] = pixels

    def clear(self, first: int, end: int) -> None:
        """Keep nothing of views `first` to `end` - 1, and put zeros into their rows."""
        self._pictures[first:end] = [None] * (end - first)
        self._patches.clear(first, end)

    def finish(self) -> dict[str, Any]:
        """Mix the images and write them; return the fields that say what was mixed."""
        recipe = self._recipe
        mixed_with = np.full(recipe.max_images, -1, dtype=np.int64)
        shares = np.ones(recipe.max_images, dtype=np.float32)
        mixes = [view.mix for image in recipe.images for view in image.views]
        shown = mix_rows(self._pictures, mixes, recipe.views)
        for row, (pixels, partner) in enumerate(shown):
            if pixels is None:
                continue
            self._patches.put(row, pixels)
            mix, place = mixes[row], self._places[row]
            if partner >= 0 and mix is not None:
                size = (pixels.shape[0], pixels.shape[1])
                mixed_with[row] = partner
                shares[row] = own_share(mix, size, place.y, place.x, recipe.patch_size)
        return self._patches.finish() | {
            "mixed_with": torch.from_numpy(mixed_with),
            "own_shares": torch.from_numpy(shares),
        }
