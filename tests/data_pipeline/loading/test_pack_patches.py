"""What lies in the memory of a pack before it is made does not show in it."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from data_pipeline.config import AugmentConfig, DropConfig, MixConfig
from data_pipeline.loading.executor import Executor
from data_pipeline.loading.recipe import pack_recipe
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.index import index_shards
from tests.data_pipeline.synthetic import config, write_shards

BUDGET, PATCH_BYTES = 768, 8 * 8 * 3
SETTINGS = {
    "plain": {},
    "prefix tokens": {"prefix_tokens": 2},
    "dropped patches kept": {"drop": DropConfig("constant", rate=0.5, keep=True)},
    "mixed": {"mix": MixConfig(mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.8)},
    "views": {"views": 3, "augment": AugmentConfig(crop_min_area=0.3, flip=True)},
    "all": {
        "prefix_tokens": 1,
        "views": 2,
        "drop": DropConfig("constant", rate=0.5, keep=True),
        "mix": MixConfig(mixup_alpha=0.8, probability=0.8),
        "augment": AugmentConfig(crop_min_area=0.3),
    },
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = write_shards(tmp_path_factory.mktemp("patches") / "shards", [60])
    return index_shards([str(folder)], workers=1, progress=False)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_row_is_written_whichever_image_cannot_be_used(manifest, settings):
    plan = Plan(manifest, config(token_budget=BUDGET, pack_window=24, **settings), num_lanes=2)
    whole = pack_recipe(plan, plan.lane(0).next_pack(), 0)
    assert len(whole.images) > 2
    executor = Executor(manifest.class_names, 5)
    for lost in [(), (0,), (1,), (len(whole.images) - 1,), range(len(whole.images))]:
        images = [
            # Another size than that in the file: it is not decoded.
            image._replace(stored_size=(1, 1)) if number in lost else image
            for number, image in enumerate(whole.images)
        ]
        recipe = replace(whole, images=tuple(images))
        made = [
            executor.execute(recipe, np.full((BUDGET, PATCH_BYTES), byte, np.uint8)).batch
            for byte in (0, 255)
        ]
        for name in (field.name for field in fields(made[0])):
            one, other = (getattr(batch, name) for batch in made)
            same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
            assert same, name
        bounds = made[0].cu_seqlens.tolist()
        for row in range(len(images) * whole.views):
            shown = made[0].patches[bounds[row] : bounds[row + 1]].any()
            assert bool(shown) == (row // whole.views not in lost)


def test_an_empty_pack_is_of_zeros(manifest):
    plan = Plan(manifest, config(token_budget=BUDGET), num_lanes=2)
    rubbish = np.full((BUDGET, PATCH_BYTES), 255, np.uint8)
    made = Executor(None, 5).execute(pack_recipe(plan, None, 0), rubbish)
    assert not made.batch.patches.any()
