"""The recipe of a pack: everything a stateless executor needs to make it from stored bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import ColourConfig, RandAugmentConfig, TextConfig
from data_pipeline.loading.decode import WHOLE, Box
from data_pipeline.loading.mix import Mix, draw_mixes
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


class ViewRecipe(NamedTuple):
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
    local: bool = False
    """It is a local view (`data.local`)."""
    colour: ColourConfig | None = None
    """Changes of colour that it may have; None: none."""
    colour_key: int = 0
    """Key of their draws."""
    rand_augment: RandAugmentConfig | None = None
    """Changes drawn from fourteen; None: none."""
    rand_augment_key: int = 0
    """Key of their draws."""
    mix: Mix | None = None
    """How it is mixed with the same view of the next image of the pack; None: not at all."""
    drop_keep: bool = False
    """Return its dropped patches too."""

    @property
    def dropped(self) -> int:
        """Number of dropped patches to return."""
        return self.grid[0] * self.grid[1] - self.keep if self.drop_keep else 0


class ImageRecipe(NamedTuple):
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
    """Number of views of each image, global and local ones."""
    has_local: bool
    """Whether some views are local ones."""
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
    drop_keep: bool = False
    """Whether dropped patches are returned, of some views or all."""
    mixes: bool = False
    """Whether images of the run may be mixed."""


@dataclass(frozen=True)
class PackOrder:
    """A planned pack, as it goes to an executor, which makes its recipe: that takes longer."""

    pack: PackPlan | None
    """None: an empty one."""
    epoch: int
    """Lowest epoch of its samples."""
    cached: Mapping[str, str] = field(default_factory=dict)
    """The files in the cache that have its remote shards, or soon will, by the paths of these."""

    def recipe(self, plan: Plan) -> PackRecipe:
        """Return the recipe of the pack."""
        return pack_recipe(plan, self.pack, self.epoch, lambda shard: self.cached.get(shard.path))


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
        views=config.views_of_sample,
        has_local=config.local.views > 0,
        token_budget=config.token_budget,
        max_images=config.max_images_per_pack,
        prefix_tokens=config.prefix_tokens,
        patch_size=plan.patch_size,
        fit=config.resolution.fit,
        require_labels=config.require_labels,
        epoch=epoch,
        max_labels=config.max_labels,
        text=config.text if config.require_captions else None,
        drop_keep=config.drop.keep or config.local.drop.keep,
        mixes=config.mix.mixes_any,
    )


def _image_recipes(
    plan: Plan, manifest: Manifest, pack: PackPlan, locate: Locate | None
) -> tuple[ImageRecipe, ...]:
    k = plan.config.views_of_sample
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
    names = ("offset", "nbytes", "height", "width")
    columns = [ids.tolist(), shards, checksums, scales.tolist()]
    columns += [samples[name].tolist() for name in names]  # lists: numpy's items are slow to take
    return tuple(
        ImageRecipe(
            sample_id=sample_id,
            shard=shard.path,
            offset=offset,
            nbytes=nbytes,
            stamp=(shard.nbytes, shard.mtime_ns),
            stored_size=(height, width),
            checksum=checksum,
            scale=scale,
            views=views[number * k : (number + 1) * k],
            cached=cached.get(shard.path),
        )
        for number, (sample_id, shard, checksum, scale, offset, nbytes, height, width) in enumerate(
            zip(*columns, strict=True)
        )
    )


def _view_recipes(plan: Plan, pack: PackPlan) -> tuple[ViewRecipe, ...]:
    """Return the recipes of all images of a pack, each a view of a sample."""
    boxes, flips = _augmentation(plan, pack)
    keep_keys = _keys(Draw.KEPT_PATCHES, plan, pack)
    local = pack.views >= plan.config.views
    rules = [plan.config.augment, plan.config.local.augment]
    colours = [rule.colour if rule.colour.changes_any else None for rule in rules]
    drawn = [rule.rand_augment if rule.rand_augment.layers else None for rule in rules]
    no_keys = [0] * len(pack.views)
    colour_keys = _keys(Draw.COLOUR, plan, pack) if any(colours) else no_keys
    drawn_keys = _keys(Draw.RAND_AUGMENT, plan, pack) if any(drawn) else no_keys
    mixes: list[Mix | None] = [None] * len(pack.views)
    if plan.config.mix.mixes_any:
        mixes = draw_mixes(plan.config.mix, np.array(_keys(Draw.MIX, plan, pack), np.uint64))
    drop_keep = [rule.drop.keep for rule in (plan.config, plan.config.local)]
    images = zip(
        *(column.tolist() for column in (pack.rows, pack.columns, pack.keep, local)),
        *(keep_keys, boxes, flips, colour_keys, drawn_keys, mixes),
        strict=True,
    )
    return tuple(
        ViewRecipe(
            grid=(rows, columns),
            keep=keep,
            keep_key=keep_key,
            box=box,
            flip=flip,
            local=is_local,
            colour=colours[is_local],
            colour_key=colour_key,
            drop_keep=drop_keep[is_local],
            rand_augment=drawn[is_local],
            rand_augment_key=drawn_key,
            mix=mix,
        )
        for rows, columns, keep, is_local, keep_key, box, flip, colour_key, drawn_key, mix in images
    )


def _augmentation(plan: Plan, pack: PackPlan) -> tuple[list[Box], list[bool]]:
    """Return the crop box of each image, and whether it is mirrored."""

    def draw(purpose: Draw) -> NDArray[np.float64]:
        return sample_uniforms(purpose, plan.config.seed, pack.epochs, pack.sample_ids, pack.views)

    boxes, flips = [WHOLE] * len(pack.sample_ids), [False] * len(pack.sample_ids)
    rules = [plan.config.augment]
    if plan.config.local.views:
        rules.append(plan.config.local.augment)
    if min(rule.crop_min_area for rule in rules) < 1:
        sides = zip(
            pack.crops.tolist(),
            draw(Draw.CROP_TOP).tolist(),
            draw(Draw.CROP_LEFT).tolist(),
            strict=True,
        )
        boxes = [Box(side, u * (1 - side), v * (1 - side)) for side, u, v in sides]
    if any(rule.flip for rule in rules):
        may_flip = np.array([rule.flip for rule in rules])
        local = (pack.views >= plan.config.views).astype(np.int64)
        flips = ((draw(Draw.FLIP) < 0.5) & may_flip[local]).tolist()
    return boxes, flips


def _keys(purpose: Draw, plan: Plan, pack: PackPlan) -> list[int]:
    """Return the key by which each image of a pack makes several draws for a purpose.

    For view 0 it is `stream_key(purpose, seed, epoch, sample)`, made for all at once.
    """
    keys = np.full(len(pack.epochs), stream_key(purpose, plan.config.seed), np.uint64)
    for part in (pack.epochs, pack.sample_ids):
        keys = mix64(keys ^ part.astype(np.uint64))
    return [int(key) for key in view_keys(keys, pack.views).tolist()]
