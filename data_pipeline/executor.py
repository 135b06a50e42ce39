"""From a recipe to a packed batch: read, decode, resize, patchify, drop. No state is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.decode import ImageError, decode_image, patchify
from data_pipeline.random_draws import hashes
from data_pipeline.recipe import ImageRecipe, PackRecipe
from data_pipeline.sample import Sample, SampleError
from data_pipeline.tar_reader import read_sample
from zeta.packed import PackedBatch, Rejected


@dataclass(frozen=True)
class ExecutedPack:
    """A pack as an executor hands it over."""

    batch: PackedBatch
    epoch: int
    rejected: tuple[Rejected, ...]


def execute(recipe: PackRecipe, class_names: Sequence[str] | None = None) -> ExecutedPack:
    """Read and decode the images of `recipe` into a packed batch.

    Labels that are names are looked up in `class_names`.

    An image that cannot be decoded keeps its rows, zero and of weight 0, and is returned in
    `rejected`: its neighbours in the pack, and every other pack, are what they would be without it.

    Raises:
        OSError: a shard cannot be read (the message names shard and offset).
    """
    budget, limit, side = recipe.token_budget, recipe.max_images, recipe.patch_size
    patches = np.zeros((budget, side * side * 3), dtype=np.uint8)
    coords = np.full((budget, 2), -1, dtype=np.int32)
    grids = np.ones((limit, 2), dtype=np.int32)
    weights = np.zeros(limit, dtype=np.float32)
    sample_ids = np.full(limit, -1, dtype=np.int64)
    labels = np.full(limit, -1, dtype=np.int64)
    lengths = np.zeros(limit + 1, dtype=np.int64)
    rejected: list[Rejected] = []
    row = 0
    for index, image in enumerate(recipe.images):
        lengths[index] = recipe.prefix_tokens + image.keep
        rows = slice(row + recipe.prefix_tokens, row + int(lengths[index]))
        row += int(lengths[index])
        kept = kept_patches(image)
        grids[index], sample_ids[index] = image.grid, image.sample_id
        coords[rows] = np.stack(np.divmod(kept, image.grid[1]), axis=1)
        sample = read_sample(image.shard, image.offset, image.nbytes)
        try:
            labels[index] = _label(sample, class_names, required=recipe.require_labels)
            patches[rows] = image_patches(sample, image, side, recipe.fit)[kept]
            weights[index] = 1
        except (SampleError, ImageError) as error:
            rejected.append(Rejected(image.sample_id, sample.key, image.shard, str(error)))
    lengths[limit] = budget - row
    batch = PackedBatch(
        patches=torch.from_numpy(patches),
        coords=torch.from_numpy(coords),
        grids=torch.from_numpy(grids),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        weights=torch.from_numpy(weights),
        sample_ids=torch.from_numpy(sample_ids),
        labels=torch.from_numpy(labels),
        lengths=tuple(lengths.tolist()),
        prefix_tokens=recipe.prefix_tokens,
    )
    return ExecutedPack(batch, recipe.epoch, tuple(rejected))


def kept_patches(image: ImageRecipe) -> NDArray[np.int64]:
    """Return the row-major indices of the patches that stay, ascending: a uniform subset."""
    total = image.grid[0] * image.grid[1]
    if image.keep == total:
        return np.arange(total)
    words = hashes(np.uint64(image.keep_key), np.arange(total))
    return np.sort(np.argsort(words, kind="stable")[: image.keep])


def image_patches(sample: Sample, image: ImageRecipe, side: int, fit: str) -> NDArray[np.uint8]:
    """Return all patches of the image at its planned size: [rows * columns, p * p * 3] uint8.

    Raises:
        SampleError: no image in the sample.
        ImageError: an image that cannot be decoded to its stated size.
    """
    pixels = decode_image(
        sample.image,
        height=image.grid[0] * side,
        width=image.grid[1] * side,
        scale=image.scale,
        fit=fit,
        stored_size=image.stored_size,
    )
    return patchify(pixels, side)


def _label(sample: Sample, class_names: Sequence[str] | None, *, required: bool) -> int:
    label = sample.label(class_names)
    if label < 0 and required:
        raise SampleError("no label: the objective needs .cls, or label in .json")
    return label
