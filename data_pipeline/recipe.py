"""The recipe of a pack: all a stateless executor needs to turn bytes on storage into patches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.manifest import ImageFormat, Manifest
from data_pipeline.plan import PackPlan, Plan
from data_pipeline.random_draws import Draw, stream_key
from data_pipeline.sampling import decode_scales


@dataclass(frozen=True)
class ImageRecipe:
    """One image: where its bytes are, what size it becomes, and which patches stay."""

    sample_id: int
    shard: str
    offset: int
    nbytes: int
    stored_size: tuple[int, int]
    """(height, width) that the manifest says; other sizes mean that the shard changed."""
    grid: tuple[int, int]
    """(rows, columns) of patches to resize to."""
    keep: int
    keep_key: int
    """Key of the draw of which patches are kept."""
    scale: int
    """JPEG reduction to decode at: 1, 2, 4 or 8."""


@dataclass(frozen=True)
class PackRecipe:
    """One pack; with no images, the empty pack of a finished or missing lane."""

    images: tuple[ImageRecipe, ...]
    token_budget: int
    max_images: int
    prefix_tokens: int
    patch_size: int
    fit: str
    require_labels: bool
    epoch: int
    """Lowest epoch of its samples."""


def pack_recipe(plan: Plan, pack: PackPlan | None, epoch: int) -> PackRecipe:
    """Return the recipe of a planned pack (None: an empty one, in `epoch`)."""
    config = plan.config
    return PackRecipe(
        images=() if pack is None else _image_recipes(plan, plan.manifest, pack),
        token_budget=config.token_budget,
        max_images=config.max_images_per_pack,
        prefix_tokens=config.prefix_tokens,
        patch_size=plan.patch_size,
        fit=config.resolution.fit,
        require_labels=config.require_labels,
        epoch=epoch,
    )


def _image_recipes(plan: Plan, manifest: Manifest, pack: PackPlan) -> tuple[ImageRecipe, ...]:
    samples = manifest.samples[pack.sample_ids]
    shards = manifest.shard_of(pack.sample_ids)
    scales = np.ones(len(samples), dtype=np.int64)
    if plan.config.decode.scaled:
        heights, widths = samples["height"].astype(np.int64), samples["width"].astype(np.int64)
        reduced = decode_scales(heights, widths, pack.rows, pack.columns, plan.patch_size)
        scales = np.where(samples["format"] == ImageFormat.JPEG, reduced, 1)
    return tuple(
        ImageRecipe(
            sample_id=int(pack.sample_ids[i]),
            shard=manifest.shards[int(shards[i])].path,
            offset=int(samples["offset"][i]),
            nbytes=int(samples["nbytes"][i]),
            stored_size=(int(samples["height"][i]), int(samples["width"][i])),
            grid=(int(pack.rows[i]), int(pack.columns[i])),
            keep=int(pack.keep[i]),
            keep_key=stream_key(
                Draw.KEPT_PATCHES, plan.config.seed, int(pack.epochs[i]), int(pack.sample_ids[i])
            ),
            scale=int(scales[i]),
        )
        for i in range(len(samples))
    )
