"""Draws a run's first packs, from its config and shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.loading.executor import Executor, decode_views
from data_pipeline.loading.fetch import read_image
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
        [pixels for image in recipe.images for pixels in _whole_images(image, recipe, deadline_s)],
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
    """Return the captions or class names of the first `images` images of a pack."""
    if batch.text_ids is not None:
        captions = torch.split(batch.text_ids, list(batch.text_lengths))[:images]
        return [open_tokenizer(tokenizer).decode(ids.tolist()) for ids in captions]
    rows = batch.labels[:, None] if batch.label_sets is None else batch.label_sets

    def name(label: int) -> str:
        return str(label) if class_names is None else class_names[label]

    return [
        ", ".join(name(label) for label in row if label >= 0) or "-"
        for row in rows[:images].tolist()
    ]


def _whole_images(
    image: ImageRecipe, recipe: PackRecipe, deadline_s: float
) -> list[NDArray[np.uint8]]:
    """Return [rows * p, columns * p, 3] pixels of each view, dropped patches included.

    They are grey if the image cannot be decoded.
    """
    sample = read_image(image, deadline_s)
    try:
        return list(decode_views(sample.image, image, recipe.patch_size, recipe.fit))
    except (SampleError, ImageError):
        sides = np.array([view.grid for view in image.views]) * recipe.patch_size
        return [np.full((*side, 3), 127, dtype=np.uint8) for side in sides.tolist()]
