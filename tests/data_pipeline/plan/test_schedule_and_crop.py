"""Scheduled drop, crops and flips follow their formulas, on 100,000 draws of the plan itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from data_pipeline.config import (
    AugmentConfig,
    DropConfig,
    DropScheduleConfig,
    ResolutionConfig,
)
from data_pipeline.loading.recipe import pack_recipe
from data_pipeline.plan.plan import PackPlan, Plan
from data_pipeline.plan.sampling import at_highest_rate, drop_rates, scheduled_rates
from tests.data_pipeline.synthetic import config, synthetic_manifest

N = 100_000
SCHEDULE = DropScheduleConfig("sigmoid", low=0.2, high=0.8, middle=1e6, width=-2e5)


@pytest.fixture(scope="module")
def manifest():
    """Images of 1600 x 1200 pixels, so that rounding to patches of 8 moves sizes little."""
    made = synthetic_manifest([N])
    made.samples["height"], made.samples["width"] = 1600, 1200
    return made


def sized(manifest, epoch: int = 0, seen: int = 0, **changes: object) -> PackPlan:
    data = config(token_budget=1 << 20, prefix_tokens=0, **changes)
    ids = np.arange(N)
    plan = Plan(manifest, data, num_lanes=4)
    return plan.size_images(ids, np.full(N, epoch), np.full(N, seen))


def test_drawn_sides_are_the_truncated_normal_of_the_paper(manifest):
    images = sized(manifest, resolution=ResolutionConfig("side_normal", 64, 1024))
    sides = np.sqrt(images.rows * images.columns) * 8
    expected = stats.truncnorm(-0.5, 1.5, loc=-0.5)
    z = (sides - 64) / (1024 - 64) * 2 - 1
    assert z.mean() == pytest.approx(expected.mean(), abs=0.01)
    assert z.std() == pytest.approx(expected.std(), abs=0.01)
    for share in (0.1, 0.5, 0.9):
        assert np.quantile(z, share) == pytest.approx(expected.ppf(share), abs=0.02)


@pytest.mark.parametrize("kind", ["side", "area"])
def test_drawn_sides_and_areas_are_uniform(manifest, kind):
    images = sized(manifest, resolution=ResolutionConfig(kind, 64, 1024))
    sides = np.sqrt(images.rows * images.columns) * 8
    u = (sides - 64) / 960 if kind == "side" else (sides**2 - 64**2) / (1024**2 - 64**2)
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert np.quantile(u, share) == pytest.approx(share, abs=0.01)


def test_drawn_beta_rates_have_the_mean_and_variance_of_the_paper(manifest):
    images = sized(
        manifest,
        resolution=ResolutionConfig("fixed", max=1024),
        drop=DropConfig("beta", rate=0.5, max=0.8),
    )
    u = (1 - images.keep / (images.rows * images.columns)) / 0.8
    mean = 0.5 / 0.8
    assert u.mean() == pytest.approx(mean, abs=0.005)
    assert u.var() == pytest.approx(0.3 * mean * (1 - mean), rel=0.02)
    assert u.max() <= 1


def test_size_and_drop_are_drawn_independently_and_anew_each_epoch(manifest):
    changes = {
        "resolution": ResolutionConfig("side", 64, 1024),
        "drop": DropConfig("beta", rate=0.5),
    }
    first, again, second = (sized(manifest, epoch, **changes) for epoch in (0, 0, 1))
    rates = [1 - images.keep / (images.rows * images.columns) for images in (first, second)]
    assert (first.keep == again.keep).all()
    assert abs(np.corrcoef(first.rows, rates[0])[0, 1]) < 0.015
    assert abs(np.corrcoef(rates[0], rates[1])[0, 1]) < 0.015


def test_the_schedule_is_the_sigmoid_of_images_seen():
    drop = DropConfig("constant", schedule=SCHEDULE)
    seen = np.array([0, 600_000, 1_000_000, 1_400_000, 10_000_000])
    expected = 0.2 + 0.6 / (1 + np.exp((seen - 1e6) / 2e5))
    assert scheduled_rates(drop, seen) == pytest.approx(expected)
    rising = replace(drop, schedule=replace(SCHEDULE, width=2e5))
    assert scheduled_rates(rising, seen) == pytest.approx(1 - expected)


def test_the_highest_rate_is_the_first_of_one_that_falls_and_the_limit_of_one_that_rises():
    falling = DropConfig("constant", schedule=SCHEDULE)
    seen = np.array([0, 10**6, 10**9])
    for drop in (falling, replace(falling, schedule=replace(SCHEDULE, width=2e5))):
        highest = scheduled_rates(at_highest_rate(drop), seen)
        assert highest == pytest.approx([scheduled_rates(drop, seen).max()] * 3)
    still = DropConfig("constant", rate=0.3)
    assert at_highest_rate(still) is still


@pytest.mark.parametrize("kind", ["constant", "beta", "resolution"])
def test_every_kind_of_drop_has_the_scheduled_mean(kind):
    drop = DropConfig(kind, min=0.3, max=0.9, schedule=SCHEDULE)
    u = (np.arange(N) + 0.5) / N
    middle = np.full(N, (136))  # half-way between the fewest and the most tokens
    for seen, mean in ((0, 0.796), (1_000_000, 0.5), (3_000_000, 0.2)):
        rates = drop_rates(
            drop,
            ResolutionConfig("side", 64, 256),
            middle,
            u,
            patch_size=16,
            seen=np.full(N, seen),
        )
        assert rates.mean() == pytest.approx(mean, abs=2e-3)
        if kind == "beta":
            share = mean / 0.9
            assert (rates / 0.9).var() == pytest.approx(0.3 * share * (1 - share), rel=0.02)
        if kind == "resolution":
            assert np.abs(rates - mean).max() <= 0.041


def test_the_plan_schedules_by_the_images_that_the_lane_was_dealt(manifest):
    schedule = DropScheduleConfig("sigmoid", low=0, high=0.9, middle=50_000, width=1_000)
    data = config(
        token_budget=4096,
        resolution=ResolutionConfig("fixed", max=128),
        drop=DropConfig("constant", schedule=schedule),
    )
    lane = Plan(manifest, data, num_lanes=4).lane(1)
    packs = [lane.next_pack() for _ in range(1500)]
    dealt = sorted(n for pack in packs for n in pack.seen.tolist())
    assert dealt[:3] == [0, 4, 8]
    for pack in packs:
        shares = pack.keep / (pack.rows * pack.columns)
        assert (shares[pack.seen < 40_000] > 0.98).all()
        assert (shares[pack.seen > 60_000] < 0.12).all()


def test_crops_keep_the_aspect_and_their_area_is_uniform(manifest):
    augment = AugmentConfig(crop_min_area=0.25)
    images = sized(manifest, resolution=ResolutionConfig("native", max=4096), augment=augment)
    area = images.crops**2
    for share in (0.1, 0.5, 0.9):
        assert np.quantile(area, share) == pytest.approx(0.25 + 0.75 * share, abs=0.01)
    assert images.rows / images.columns == pytest.approx(np.full(N, 4 / 3), rel=0.02)
    assert images.rows == pytest.approx(images.crops * 1600 / 8, abs=0.51)


def test_boxes_lie_inside_the_image_and_half_of_the_images_are_mirrored(manifest):
    data = config(
        token_budget=1 << 20,
        resolution=ResolutionConfig("fixed", max=64),
        augment=AugmentConfig(flip=True, crop_min_area=0.25),
    )
    plan = Plan(manifest, data, num_lanes=4)
    ids = np.arange(4000)
    recipe = pack_recipe(plan, plan.size_images(ids, ids * 0), 0)
    images = [view for image in recipe.images for view in image.views]
    boxes = np.array([image.box for image in images])
    assert (boxes[:, 1:] >= 0).all()
    assert (boxes[:, 1:] + boxes[:, :1] <= 1 + 1e-9).all()
    free = 1 - boxes[:, 0]
    for column in (1, 2):
        assert (boxes[:, column] / free).mean() == pytest.approx(0.5, abs=0.02)
    assert abs(np.corrcoef(boxes[:, 1] / free, boxes[:, 2] / free)[0, 1]) < 0.05
    assert np.mean([image.flip for image in images]) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DropConfig("none", schedule=SCHEDULE), "no rate to schedule"),
        (lambda: DropConfig("beta", max=0.7, schedule=SCHEDULE), r"schedule\.high is 0\.8"),
        (lambda: DropScheduleConfig("sigmoid", width=0), r"schedule\.width is 0"),
        (lambda: AugmentConfig(crop_min_area=0), r"crop_min_area is 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
