"""The recipe of a pack: everything a stateless executor needs to make it from stored bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import TextConfig
from data_pipeline.loading.decode import WHOLE, Box
from data_pipeline.plan.plan import PackPlan, Plan
from data_pipeline.plan.random_draws import (
    Draw,
    mix64,
    sample_uniforms,
    stream_key,
    view_keys,
)
from data_pipeline.plan.sampling import decode_scales
from data_pipeline.shards.manifest import ImageFormat, Manifest, Shard


@dataclass(frozen=True)
class ViewRecipe:
    """The recipe of one view of an image: its size, its crop, and its kept patches."""

    grid: tuple[int, int]
    """(rows, columns) of patches to resize to."""
    keep: int
    """Number of patches to keep."""
    keep_key: int
    """Key of the draw that chooses them."""
    box: Box = WHOLE
    """Part of the image to use."""
    flip: bool = False
    """Mirror the image left to right."""


@dataclass(frozen=True)
class ImageRecipe:
    """The recipe of one image: the place of its bytes, and its views."""

    sample_id: int
    shard: str
    """Path or URL of the shard."""
    offset: int
    """First byte of the sample in the shard."""
    nbytes: int
    """Number of bytes of the sample, tar headers included."""
    stamp: tuple[int, int]
    """(bytes, mtime in ns) of the shard when it was indexed."""
    stored_size: tuple[int, int]
    """(height, width) in the manifest; another size means that the shard changed."""
    checksum: int
    """Checksum of its bytes when it was indexed; 0 if the index has none."""
    scale: int
    """JPEG reduction to decode at, once for all views: 1, 2, 4 or 8."""
    views: tuple[ViewRecipe, ...]
    """Views of the image, each a row of the pack."""
    cached: str | None = None
    """File in the cache that has the remote shard, or soon will; None reads `shard` itself."""


@dataclass(frozen=True)
class PackRecipe:
    """The recipe of one pack; without images, the empty pack of a finished or missing lane."""

    images: tuple[ImageRecipe, ...]
    views: int
    """Number of views of each image."""
    token_budget: int
    max_images: int
    prefix_tokens: int
    patch_size: int
    fit: str
    require_labels: bool
    epoch: int
    """Lowest epoch of its samples."""
    max_labels: int | None = None
    """Most labels of an image, if images have lists of labels."""
    text: TextConfig | None = None
    """Tokens of captions, if they are needed."""


Locate = Callable[[Shard], str | None]
"""Function that returns the cached file of a shard, or None if the shard is read in place."""


def pack_recipe(
    plan: Plan, pack: PackPlan | None, epoch: int, locate: Locate | None = None
) -> PackRecipe:
    """Return the recipe of a planned pack; None gives an empty one.

    Args:
        plan: the plan of the run.
        pack: the pack, or None.
        epoch: lowest epoch of the samples in the pack.
        locate: the cache of remote shards, if there is one.
    """
    config = plan.config
    return PackRecipe(
        images=() if pack is None else _image_recipes(plan, plan.manifest, pack, locate),
        views=config.views,
        token_budget=config.token_budget,
        max_images=config.max_images_per_pack,
        prefix_tokens=config.prefix_tokens,
        patch_size=plan.patch_size,
        fit=config.resolution.fit,
        require_labels=config.require_labels,
        epoch=epoch,
        max_labels=config.max_labels,
        text=config.text if config.require_captions else None,
    )


def _image_recipes(
    plan: Plan, manifest: Manifest, pack: PackPlan, locate: Locate | None
) -> tuple[ImageRecipe, ...]:
    k = plan.config.views
    ids = pack.sample_ids[::k]
    samples = manifest.samples[ids]
    shards = [manifest.shards[index] for index in manifest.shard_of(ids).tolist()]
    checksums = manifest.known_checksums[ids].tolist()
    cached = {shard.path: locate(shard) for shard in shards} if locate is not None else {}
    scales = np.ones(len(samples), dtype=np.int64)
    if plan.config.decode.scaled:
        heights = np.repeat(samples["height"], k) * pack.crops
        widths = np.repeat(samples["width"], k) * pack.crops
        reduced = decode_scales(heights, widths, pack.rows, pack.columns, plan.patch_size)
        # The image is decoded once, at the scale that the largest of its views needs.
        reduced = reduced.reshape(-1, k).min(axis=1)
        scales = np.where(samples["format"] == ImageFormat.JPEG, reduced, 1)
    views = _view_recipes(plan, pack)
    return tuple(
        ImageRecipe(
            sample_id=int(ids[i]),
            shard=shards[i].path,
            offset=int(samples["offset"][i]),
            nbytes=int(samples["nbytes"][i]),
            stamp=(shards[i].nbytes, shards[i].mtime_ns),
            stored_size=(int(samples["height"][i]), int(samples["width"][i])),
            checksum=checksums[i],
            scale=int(scales[i]),
            views=views[i * k : (i + 1) * k],
            cached=cached.get(shards[i].path),
        )
        for i in range(len(samples))
    )


def _view_recipes(plan: Plan, pack: PackPlan) -> tuple[ViewRecipe, ...]:
    """Return the recipes of all images of a pack, each a view of a sample."""
    boxes, flips = _augmentation(plan, pack)
    keep_keys = _keep_keys(plan, pack)
    return tuple(
        ViewRecipe(
            grid=(int(pack.rows[i]), int(pack.columns[i])),
            keep=int(pack.keep[i]),
            keep_key=keep_keys[i],
            box=boxes[i],
            flip=flips[i],
        )
        for i in range(len(pack.sample_ids))
    )


def _augmentation(plan: Plan, pack: PackPlan) -> tuple[list[Box], list[bool]]:
    """Return the crop box of each image, and whether it is mirrored."""

    def draw(purpose: Draw) -> NDArray[np.float64]:
        return sample_uniforms(purpose, plan.config.seed, pack.epochs, pack.sample_ids, pack.views)

    boxes, flips = [WHOLE] * len(pack.sample_ids), [False] * len(pack.sample_ids)
    if plan.config.augment.crop_min_area < 1:
        sides = zip(
            pack.crops.tolist(),
            draw(Draw.CROP_TOP).tolist(),
            draw(Draw.CROP_LEFT).tolist(),
            strict=True,
        )
        boxes = [Box(side, u * (1 - side), v * (1 - side)) for side, u, v in sides]
    if plan.config.augment.flip:
        flips = (draw(Draw.FLIP) < 0.5).tolist()
    return boxes, flips


def _keep_keys(plan: Plan, pack: PackPlan) -> list[int]:
    """Return the key by which each image of a pack chooses its patches.

    For view 0 it is `stream_key(Draw.KEPT_PATCHES, seed, epoch, sample)`, made for all at once.
    """
    keys = np.full(len(pack.epochs), stream_key(Draw.KEPT_PATCHES, plan.config.seed), np.uint64)
    for part in (pack.epochs, pack.sample_ids):
        keys = mix64(keys ^ part.astype(np.uint64))
    return [int(key) for key in view_keys(keys, pack.views).tolist()]
