"""Draws a run's first packs, from its config and shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.loading.executor import Executor, decode_views
from data_pipeline.loading.fetch import read_image
from data_pipeline.loading.mix import mix_rows
from data_pipeline.loading.recipe import ImageRecipe, PackRecipe, pack_recipe
from data_pipeline.loading.tokenizer import open_tokenizer
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.images.header import ImageError
from data_pipeline.shards.sample import SampleError
from data_pipeline.shards.weighted import open_shards
from launch.config.load import load_config
from launch.config.resolve import resolve_with_shards, training_plan
from launch.report.pack_picture import PackPicture, draw_images, draw_pack
from zeta.packed import PackedBatch
from zeta.run.directory import RunDir


def plan_of(run_dir: RunDir) -> Plan:
    """Return the plan that a run was trained by.

    Raises:
        ValueError: the run's config or shards are gone or have changed.
    """
    config = load_config(str(run_dir.config))
    manifest = open_shards(config.data.shards)
    return training_plan(resolve_with_shards(config, manifest), manifest)


def draw_first_pack(run_dir: RunDir, plan: Plan) -> Path:
    """Draw the first pack of lane 0 of a run's plan to pack.svg, and return its path."""
    path = run_dir.pack_picture
    path.write_bytes(draw_pack(first_pack_picture(plan, lane=0)))
    return path


def draw_first_packs(folder: Path, plan: Plan, count: int) -> None:
    """Draw the first packs of the first `count` lanes to `pack_1.png` and so on in a folder.

    Raises:
        OSError, ValueError: the shards cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for lane in range(min(count, plan.num_lanes)):
        draw_images(first_pack_picture(plan, lane)).save(folder / f"pack_{lane + 1}.png")


def first_pack_picture(plan: Plan, lane: int) -> PackPicture:
    """Read and decode the first pack of a lane of a plan, and return what `draw_pack` draws."""
    recipe = pack_recipe(plan, plan.lane(lane).next_pack(), epoch=0)
    class_names = plan.manifest.class_names
    deadline_s = plan.config.read_deadline_s
    batch = Executor(class_names, deadline_s).execute(recipe).batch
    return PackPicture.from_batch(
        batch,
        _shown_images(recipe, deadline_s),
        titles(
            batch,
            recipe.views * len(recipe.images),
            class_names,
            plan.config.text.tokenizer,
        ),
    )


def titles(
    batch: PackedBatch, images: int, class_names: Sequence[str] | None, tokenizer: str
) -> list[str]:
    """Return the captions or class names of the first `images` images of a pack.

    An image mixed of two has both classes, the larger share first, as in "cat 60%, dog".
    """
    if batch.text_ids is not None:
        captions = torch.split(batch.text_ids, list(batch.text_lengths))[:images]
        return [open_tokenizer(tokenizer).decode(ids.tolist()) for ids in captions]
    rows = batch.labels[:, None] if batch.label_sets is None else batch.label_sets

    def name(label: int) -> str:
        return str(label) if class_names is None else class_names[label]

    names = [", ".join(name(label) for label in row if label >= 0) or "-" for row in rows.tolist()]
    if batch.mixed_with is None or batch.own_shares is None:
        return names[:images]
    mixes = zip(names, batch.mixed_with.tolist(), batch.own_shares.tolist(), strict=True)
    return [_mixed_title(own, names, *mix) for own, *mix in mixes][:images]


def _mixed_title(own: str, names: Sequence[str], partner: int, share: float) -> str:
    if partner < 0:
        return own
    first, second = (own, names[partner]) if share >= 0.5 else (names[partner], own)
    return f"{first} {max(share, 1 - share):.0%}, {second}"


def _shown_images(recipe: PackRecipe, deadline_s: float) -> list[NDArray[np.uint8]]:
    """Return [rows * p, columns * p, 3] pixels of each view of a pack, dropped patches included.

    They are grey if an image cannot be decoded.
    """
    views = [view for image in recipe.images for view in image.views]
    decoded = [
        pixels for image in recipe.images for pixels in _whole_images(image, recipe, deadline_s)
    ]
    shown = mix_rows(decoded, [view.mix for view in views], recipe.views)
    grey = np.full((recipe.patch_size, recipe.patch_size, 3), 127, dtype=np.uint8)
    return [
        np.tile(grey, (*view.grid, 1)) if pixels is None else pixels
        for view, (pixels, _) in zip(views, shown, strict=True)
    ]


def _whole_images(
    image: ImageRecipe, recipe: PackRecipe, deadline_s: float
) -> list[NDArray[np.uint8] | None]:
    """Return the pixels of each view before mixing, None if the image cannot be decoded."""
    sample = read_image(image, deadline_s)
    try:
        return list(decode_views(sample.image, image, recipe.patch_size, recipe.fit))
    except (SampleError, ImageError):
        return [None] * len(image.views)
