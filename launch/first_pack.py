"""The picture of a run's first pack, drawn from its config and shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.executor import Executor, decode_recipe
from data_pipeline.image_header import ImageError
from data_pipeline.recipe import ImageRecipe, PackRecipe, pack_recipe
from data_pipeline.sample import SampleError
from data_pipeline.tar_reader import read_sample
from data_pipeline.weighted import open_shards
from launch.config import load_config
from launch.pack_picture import PackPicture, draw_pack
from launch.run_setup import resolve_with_shards, training_plan
from zeta.run_dir import RunDir


def draw_first_pack(run_dir: RunDir) -> Path:
    """Write the picture of the first pack that lane 0 of the run trained on, and return its path.

    Raises:
        ValueError: the run's config or shards are gone or changed.
    """
    config = load_config(str(run_dir.config))
    manifest = open_shards(config.data.shards)
    plan = training_plan(resolve_with_shards(config, manifest), manifest)
    recipe = pack_recipe(plan, plan.lane(0).next_pack(), epoch=0)
    batch = Executor(manifest.class_names, plan.config.read_deadline_s).execute(recipe).batch
    names = manifest.class_names
    labels = batch.labels[: len(recipe.images)].tolist()
    picture = PackPicture.from_batch(
        batch,
        [_whole_image(image, recipe) for image in recipe.images],
        [str(label) if names is None or label < 0 else names[label] for label in labels],
    )
    path = run_dir.pack_picture
    path.write_bytes(draw_pack(picture))
    return path


def _whole_image(image: ImageRecipe, recipe: PackRecipe) -> NDArray[np.uint8]:
    """Return [rows * p, columns * p, 3] pixels, dropped patches included; grey if undecodable."""
    sample = read_sample(image.shard, image.offset, image.nbytes)
    try:
        return decode_recipe(sample.image, image, recipe.patch_size, recipe.fit)
    except (SampleError, ImageError):
        rows, columns = (count * recipe.patch_size for count in image.grid)
        return np.full((rows, columns, 3), 127, dtype=np.uint8)
