"""Dropped patches leave the worker where they are asked for, and change nothing else."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from data_pipeline.config import DropConfig, LocalDropConfig, LocalViewsConfig, ResolutionConfig
from data_pipeline.loading.executor import Executor
from data_pipeline.loading.loader import PackLoader
from data_pipeline.loading.recipe import pack_recipe
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from tests.data_pipeline.synthetic import config, write_shards
from zeta.packed import join_packs

DROPPED = ("dropped_patches", "dropped_coords", "dropped_image")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = write_shards(tmp_path_factory.mktemp("dropped") / "shards", [30])
    index_shards([str(folder)], workers=1, progress=False)
    return Manifest.open(str(folder))


def plan(manifest, *, keep, kind="constant", workers=0, **changes):
    data = config(
        token_budget=512,
        max_images_per_pack=40,
        pack_window=24,
        resolution=ResolutionConfig("side", 32, 64, max_upscale=9),
        drop=DropConfig(kind, 0.6, keep=keep),
        prefix_tokens=1,
        workers=workers,
        **changes,
    )
    return Plan(manifest, data, 2)


def recipe(plan):
    return pack_recipe(plan, plan.lane(0).next_pack(), epoch=0)


def executed(recipe):
    return Executor(None, 5.0).execute(recipe).batch


def whole_images(pack):
    """Each image of a pack as {(y, x): bytes}, of its kept and its dropped patches."""
    images = [{} for _ in pack.weights]
    bounds = pack.cu_seqlens.tolist()
    for image, found in enumerate(images):
        rows = range(bounds[image] + pack.prefix_tokens, bounds[image + 1])
        found |= {tuple(pack.coords[r].tolist()): pack.patches[r].numpy().tobytes() for r in rows}
    columns = (pack.dropped_image, pack.dropped_coords, pack.dropped_patches)
    for image, yx, patch in zip(*columns, strict=True):
        assert tuple(yx.tolist()) not in images[int(image)]
        images[int(image)][tuple(yx.tolist())] = patch.numpy().tobytes()
    return images


def test_kept_and_dropped_patches_make_up_every_image(manifest):
    made = recipe(plan(manifest, keep=True))
    pack = executed(made)
    undropped = tuple(
        image._replace(views=tuple(v._replace(keep=v.grid[0] * v.grid[1]) for v in image.views))
        for image in made.images
    )
    whole = executed(replace(made, images=undropped, token_budget=4096))
    assert len(pack.dropped_image) > pack.num_tokens / 2
    assert len(whole.dropped_image) == 0
    assert whole_images(pack) == whole_images(whole)
    assert pack.host_grids == tuple(map(tuple, pack.grids.tolist()))
    assert bool((pack.dropped_image.diff() >= 0).all())


def test_the_packs_are_bit_for_bit_those_without_them(manifest):
    on, off = (executed(recipe(plan(manifest, keep=keep))) for keep in (True, False))
    assert all(getattr(off, name) is None for name in DROPPED)
    for name in {field.name for field in fields(off)} - set(DROPPED):
        mine, theirs = getattr(on, name), getattr(off, name)
        same = torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        assert same, name


def test_they_survive_workers_and_joining(manifest):
    (alone,), (by_worker,) = (
        [next(iter(PackLoader(plan(manifest, keep=True, workers=workers)).steps(None))).packs[:1]]
        for workers in (0, 1)
    )
    for name in DROPPED:
        assert torch.equal(getattr(alone[0], name), getattr(by_worker[0], name))
    assert by_worker[0].host_grids == alone[0].host_grids
    packs = next(iter(PackLoader(plan(manifest, keep=True)).steps(None))).packs
    joined = join_packs(packs, "cpu")
    assert whole_images(joined) == [image for pack in packs for image in whole_images(pack)]
    assert joined.host_grids == tuple(map(tuple, joined.grids.tolist()))


def test_an_image_that_cannot_be_used_has_zeros_and_its_neighbours_stay(manifest):
    made = recipe(plan(manifest, keep=True))
    good = executed(made)
    images = list(made.images)
    images[1] = images[1]._replace(stored_size=(1, 1))  # another size than that in the file
    pack = executed(replace(made, images=tuple(images)))
    assert pack.weights[1] == 0
    own = pack.dropped_image == 1
    assert own.any()
    assert not pack.dropped_patches[own].any()
    assert torch.equal(pack.dropped_patches[~own], good.dropped_patches[~own])
    assert torch.equal(pack.dropped_coords, good.dropped_coords)


def test_local_views_follow_their_own_setting(manifest):
    for keep in (False, True):
        local = LocalViewsConfig(1, drop=LocalDropConfig("constant", 0.5, keep=not keep))
        pack = executed(recipe(plan(manifest, keep=keep, local=local)))
        found = np.unique(pack.local_views[pack.dropped_image].numpy())
        assert found.tolist() == [not keep]
