"""RandAugment: each image's changes are a pure function of its key, and off they change nothing."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.config import (
    AugmentConfig,
    LocalAugmentConfig,
    LocalViewsConfig,
    RandAugmentConfig,
)
from data_pipeline.loading.executor import Executor
from data_pipeline.loading.loader import PackLoader
from data_pipeline.loading.rand_augment import CHANGES, rand_augmented
from data_pipeline.loading.recipe import pack_recipe
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from tests.data_pipeline.synthetic import config, write_shards


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = write_shards(tmp_path_factory.mktemp("rand") / "shards", [40])
    index_shards([str(folder)], workers=1, progress=False)
    return Manifest.open(str(folder))


def photo() -> np.ndarray:
    y, x = np.mgrid[0:40, 0:60]
    return np.stack([40 + 3 * x, 30 + 4 * y, (x * y) % 200], axis=2).astype(np.uint8)


def plan(manifest, **settings) -> Plan:
    augment = AugmentConfig(flip=True, rand_augment=RandAugmentConfig(**settings))
    return Plan(manifest, config(augment=augment, pack_window=16), 3)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_keeps_the_size_and_grows_with_its_strength(name):
    image = Image.fromarray(photo())
    by = [
        np.abs(np.asarray(CHANGES[name](image, s)).astype(int) - photo()).mean()
        for s in (0.0, 0.3, 1.0)
    ]
    assert CHANGES[name](image, 1.0).size == image.size
    if name in ("auto_contrast", "equalize"):  # these have one strength
        assert by[0] == by[1] == by[2] > 0
    elif name == "identity":
        assert by == [0, 0, 0]
    else:
        assert by[0] == 0 < by[1] < by[2]


def test_moves_uncover_grey_on_the_side_they_come_from():
    right = np.asarray(CHANGES["translate_x"](Image.fromarray(photo()), -1.0))
    left = np.asarray(CHANGES["translate_x"](Image.fromarray(photo()), 1.0))
    assert (right[:, :26] == 128).all()
    assert np.array_equal(right[:, 28:], photo()[:, 1:33])
    assert (left[:, -26:] == 128).all()


def test_the_same_key_gives_the_same_image_and_all_changes_are_drawn_equally_often():
    drawn = RandAugmentConfig(layers=1, magnitude=30)
    made = [rand_augmented(photo(), drawn, key) for key in range(700)]
    assert all(np.array_equal(made[k], rand_augmented(photo(), drawn, k)) for k in range(20))
    kinds: dict[bytes, str] = {}
    for name, strength in itertools.product(CHANGES, (1.0, -1.0)):
        kinds[np.asarray(CHANGES[name](Image.fromarray(photo()), strength)).tobytes()] = name
    names = [kinds[image.tobytes()] for image in made]
    counts = [names.count(name) for name in CHANGES]
    assert 25 < min(counts) <= max(counts) < 80  # 50 each


def test_two_layers_are_two_changes_one_after_the_other():
    one, two = RandAugmentConfig(layers=1), RandAugmentConfig(layers=2)
    differs = sum(
        not np.array_equal(rand_augmented(photo(), one, key), rand_augmented(photo(), two, key))
        for key in range(50)
    )
    assert differs > 35  # all but identity and what the first one made


def test_an_image_and_its_epoch_decide_its_changes_in_any_pack_on_any_number_of_ranks(manifest):
    by_world = []
    for world_size in (1, 3):
        found = {}
        for rank in range(world_size):
            loader = PackLoader(plan(manifest, layers=2), rank=rank, world_size=world_size)
            for step in itertools.islice(loader.steps(None), 4):
                for lane, pack in zip(step.lanes, step.packs, strict=True):
                    found[step.step, lane] = pack.patches
        by_world.append(found)
    one, three = by_world
    assert one.keys() == three.keys()
    assert all(torch.equal(one[place], three[place]) for place in one)


def test_it_changes_pixels_alone_and_nothing_if_it_has_no_layers(manifest):
    made = []
    for layers in (0, 0, 2):
        whole = plan(manifest, layers=layers, magnitude=15)
        pack = whole.lane(0).next_pack()
        made.append(Executor(manifest.class_names, 60).execute(pack_recipe(whole, pack, 0)).batch)
    whole = Plan(manifest, config(augment=AugmentConfig(flip=True), pack_window=16), 3)
    recipe = pack_recipe(whole, whole.lane(0).next_pack(), 0)
    without = Executor(manifest.class_names, 60).execute(recipe).batch
    off, again, on = made
    assert torch.equal(off.patches, again.patches)
    assert torch.equal(off.patches, without.patches)
    assert not torch.equal(off.patches, on.patches)
    for name, tensor in off.tensors().items():
        assert name == "patches" or torch.equal(tensor, on.tensors()[name]), name


def test_local_views_have_rules_of_their_own(manifest):
    local = LocalViewsConfig(2, augment=LocalAugmentConfig())
    drawn = replace(local.augment.rand_augment, layers=2, magnitude=20)
    batches = []
    for augment in (local.augment, replace(local.augment, rand_augment=drawn)):
        data = config(local=replace(local, augment=augment), token_budget=512, pack_window=16)
        whole = Plan(manifest, data, 2)
        recipe = pack_recipe(whole, whole.lane(0).next_pack(), 0)
        batches.append(Executor(manifest.class_names, 60).execute(recipe).batch)
    plain, changed = batches
    rows = torch.repeat_interleave(plain.cu_seqlens.diff().long())
    is_local = torch.cat([plain.local_views, torch.tensor([False])])[rows]
    differs = (plain.patches != changed.patches).any(dim=1)
    assert not differs[~is_local].any()
    assert differs[is_local].any()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: RandAugmentConfig(layers=-1), r"data\.augment\.rand_augment\.layers is -1"),
        (lambda: RandAugmentConfig(layers=1.5), r"data\.augment\.rand_augment\.layers is 1\.5"),
        (
            lambda: RandAugmentConfig(magnitude=31),
            r"data\.augment\.rand_augment\.magnitude is 31; it must be at least 0 and at most 30",
        ),
        (
            lambda: replace(LocalAugmentConfig().rand_augment, magnitude=-1),
            r"data\.local\.augment\.rand_augment\.magnitude is -1",
        ),
    ],
)
def test_a_value_that_cannot_be_is_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
