"""Local views and changed colours: planned by rules of their own, and each a pure function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from data_pipeline.config import (
    AugmentConfig,
    ColourConfig,
    DataConfig,
    LocalAugmentConfig,
    LocalColourConfig,
    LocalDropConfig,
    LocalDropScheduleConfig,
    LocalResolutionConfig,
    LocalViewsConfig,
    ResolutionConfig,
)
from data_pipeline.loading.colour import recoloured
from data_pipeline.loading.executor import Executor
from data_pipeline.loading.recipe import pack_recipe
from data_pipeline.plan.plan import Plan
from data_pipeline.plan.random_draws import uniforms
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from tests.data_pipeline.synthetic import config, write_shards

GLOBAL, LOCAL = 2, 3


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = write_shards(tmp_path_factory.mktemp("local") / "shards", [40])
    index_shards([str(folder)], workers=1, progress=False)
    return Manifest.open(str(folder))


def plan(manifest, colour=0.0, views=GLOBAL, local=LOCAL):
    data = config(
        views=views,
        token_budget=1024,
        max_images_per_pack=80,
        pack_window=24,
        resolution=ResolutionConfig("side", 48, 64, max_upscale=9),
        augment=AugmentConfig(flip=True, crop_min_area=0.5),
        local=LocalViewsConfig(
            local,
            LocalResolutionConfig("side", 16, 32, max_upscale=9),
            augment=LocalAugmentConfig(
                crop_min_area=0.05, crop_max_area=0.3, colour=LocalColourConfig(jitter=colour)
            ),
        ),
    )
    return Plan(manifest, data, 2)


def test_each_kind_of_view_has_sizes_and_crops_of_its_own(manifest):
    whole = plan(manifest)
    pack = whole.lane(0).next_pack()
    local = pack.views >= GLOBAL
    assert pack.views.tolist() == [0, 1, 2, 3, 4] * pack.num_samples
    sides = np.sqrt(pack.rows * pack.columns) * whole.patch_size
    assert sides[~local].min() > sides[local].max()
    areas = pack.crops**2
    assert areas[~local].min() >= 0.5
    assert 0.05 <= areas[local].min() < areas[local].max() <= 0.3


def test_local_views_change_nothing_in_the_draws_of_global_ones(manifest):
    both, alone = plan(manifest), plan(manifest, local=0)
    ids, epochs = np.arange(20), np.zeros(20, dtype=np.int64)
    drawn, expected = both.size_images(ids, epochs), alone.size_images(ids, epochs)
    kept = drawn.select(np.flatnonzero(drawn.views < GLOBAL))
    for name in ("sample_ids", "rows", "columns", "keep", "crops", "views"):
        assert np.array_equal(getattr(kept, name), getattr(expected, name)), name


def test_the_expected_tokens_of_shards_count_all_views(manifest):
    both, alone = plan(manifest), plan(manifest, views=1, local=0)
    assert both.masses.tokens.sum() > GLOBAL * alone.masses.tokens.sum()


def test_a_pack_says_which_rows_are_local_views(manifest):
    whole = plan(manifest)
    pack = whole.lane(0).next_pack()
    batch = Executor(manifest.class_names, 60).execute(pack_recipe(whole, pack, 0)).batch
    used = len(pack.views)
    assert batch.local_views[:used].tolist() == (pack.views >= GLOBAL).tolist()
    assert not batch.local_views[used:].any()
    assert batch.view_of[:used].tolist() == [i - i % 5 for i in range(used)]


def test_colours_change_the_pixels_of_their_kind_alone_and_always_in_the_same_way(manifest):
    made = []
    for colour in (0.0, 1.0, 1.0):
        whole = plan(manifest, colour)
        recipe = pack_recipe(whole, whole.lane(0).next_pack(), 0)
        made.append(Executor(manifest.class_names, 60).execute(recipe).batch)
    plain, coloured, again = made
    assert torch.equal(coloured.patches, again.patches)
    assert torch.equal(plain.coords, coloured.coords)
    row_T = torch.repeat_interleave(plain.cu_seqlens.diff().long())
    is_local = torch.cat([plain.local_views, torch.tensor([False])])[row_T]
    differs = (plain.patches != coloured.patches).any(dim=1)
    assert not differs[~is_local].any()
    assert differs[is_local].float().mean() > 0.9


def photo():
    y, x = np.mgrid[0:40, 0:60]
    return np.stack([4 * x, 6 * y, 255 - 4 * x], axis=2).astype(np.uint8)


def test_each_change_of_colour_does_what_it_says():
    image = photo()
    assert np.array_equal(recoloured(image, ColourConfig(), 5), image)
    grey = recoloured(image, ColourConfig(grey=1), 5)
    assert (grey == grey[:, :, :1]).all()
    solarised = recoloured(image, ColourConfig(solarise=1), 5)
    assert np.array_equal(solarised, np.where(image < 128, image, 255 - image))
    stripes = np.zeros((224, 224, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    blurred = [recoloured(stripes, ColourConfig(blur=1), key) for key in range(20)]
    assert min(int(made.max()) - int(made.min()) for made in blurred) < 100
    still = ColourConfig(jitter=1, brightness=0, contrast=0, saturation=0, hue=0)
    assert np.array_equal(recoloured(image, still, 5), image)
    lighter = [
        recoloured(image, ColourConfig(jitter=1, contrast=0, saturation=0, hue=0), key).mean()
        for key in range(50)
    ]
    assert min(lighter) < image.mean() * 0.8
    assert max(lighter) > image.mean() * 1.15


@pytest.mark.parametrize("number", [1, 2, 3])
def test_brightness_contrast_and_saturation_are_those_of_pillow(number):
    name = ["brightness", "contrast", "saturation"][number - 1]
    enhancer = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color][number - 1]
    only = dict.fromkeys(["brightness", "contrast", "saturation", "hue"], 0) | {name: 0.4}
    image = photo()
    for key in range(20):
        factor = 0.6 + 0.8 * uniforms(np.uint64(key), np.arange(9))[number]
        theirs = np.asarray(enhancer(Image.fromarray(image)).enhance(factor), dtype=int)
        ours = recoloured(image, ColourConfig(jitter=1, **only), key)
        assert np.abs(ours - theirs).max() <= 1


def test_hues_turn_at_constant_luma_and_greys_stay():
    luma = np.array([0.299, 0.587, 0.114])
    turns = ColourConfig(jitter=1, brightness=0, contrast=0, saturation=0, hue=0.1)
    red = np.full((2, 2, 3), (160, 90, 90), dtype=np.uint8)
    greys = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)
    ways = set()
    for key in range(20):
        turn = 0.1 * (2 * uniforms(np.uint64(key), np.arange(9))[4] - 1)
        r, g, b = (int(value) for value in recoloured(red, turns, key)[0, 0])
        assert abs(luma @ [r, g, b] - luma @ [160, 90, 90]) < 1
        if abs(turn) > 0.02:
            assert (g > b) == (turn > 0)  # red turns to yellow, or to purple
            ways.add(turn > 0)
        assert np.abs(recoloured(greys, turns, key).astype(int) - greys).max() <= 1
    assert ways == {True, False}


def test_a_change_has_its_probability():
    made = [recoloured(photo(), ColourConfig(grey=0.3), key) for key in range(300)]
    grey = [(image == image[:, :, :1]).all() for image in made]
    assert 0.2 < np.mean(grey) < 0.4


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: LocalResolutionConfig(min=9, max=8), r"data\.local\.resolution\.max is 8"),
        (
            lambda: LocalDropConfig(schedule=LocalDropScheduleConfig(kind="sigmoid")),
            r"data\.local\.drop\.schedule\.kind is 'sigmoid', but data\.local\.drop\.kind is none",
        ),
        (lambda: LocalViewsConfig(views=-1), r"data\.local\.views is -1"),
        (lambda: LocalColourConfig(grey=2), r"data\.local\.augment\.colour\.grey is 2"),
        (lambda: ColourConfig(hue=0.7), r"data\.augment\.colour\.hue is 0\.7"),
        (
            lambda: AugmentConfig(crop_min_area=0.5, crop_max_area=0.4),
            r"data\.augment\.crop_max_area is 0\.4",
        ),
        (
            lambda: DataConfig(local=LocalViewsConfig(1, LocalResolutionConfig(fit="crop"))),
            r"data\.local\.resolution\.fit is crop and data\.resolution\.fit keep",
        ),
        (
            lambda: DataConfig(views=2, local=LocalViewsConfig(6), max_images_per_pack=7),
            r"data\.views is 2 and data\.local\.views 6, above .* to at least 8",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
