"""The length of a run by epochs is known from its plan."""

from __future__ import annotations

import pytest

from data_pipeline.config import (
    DropConfig,
    DropScheduleConfig,
    LocalDropConfig,
    LocalDropScheduleConfig,
    LocalResolutionConfig,
    LocalViewsConfig,
    MixConfig,
)
from data_pipeline.loading.loader import PackLoader
from data_pipeline.plan.length import planned_length
from data_pipeline.plan.plan import Plan
from data_pipeline.plan.summary import summarise
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from tests.data_pipeline.synthetic import config, synthetic_manifest, write_shards


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = write_shards(tmp_path_factory.mktemp("length") / "shards", [40, 25])
    index_shards([str(folder)], workers=1, progress=False)
    return Manifest.open(str(folder))


@pytest.mark.parametrize(("lanes", "epochs", "views"), [(1, 1, 1), (3, 2, 1), (2, 3, 2)])
def test_it_is_that_of_the_steps_that_the_loader_gives(manifest, lanes, epochs, views):
    whole = Plan(manifest, config(views=views, pack_window=16), lanes, max_epochs=epochs)
    found = {"steps": 0, "images": 0, "tokens": 0}
    for step in PackLoader(whole).steps(None):
        if step.num_images == 0 and not step.more:
            break
        found["steps"] += 1
        found["images"] += step.num_images
        found["tokens"] += step.num_tokens
        if not step.more:
            break
    assert {unit: planned_length(whole, unit) for unit in found} == found


@pytest.mark.parametrize("unit", ["steps", "images", "tokens"])
def test_of_a_long_run_it_is_estimated_closely(unit):
    whole = Plan(synthetic_manifest([2000, 1500]), config(pack_window=256), 4, max_epochs=3)
    exact = planned_length(whole, unit)
    for exact_up_to in (10_000, 2_000):  # by a whole epoch, and by some of its windows
        estimate = planned_length(whole, unit, exact_up_to=exact_up_to)
        assert estimate == pytest.approx(exact, rel=0.04)
    again = Plan(synthetic_manifest([2000, 1500]), config(pack_window=256), 4, max_epochs=3)
    assert planned_length(again, unit, exact_up_to=2_000) == estimate


def moving(middle, width, **changes):
    schedule = DropScheduleConfig("sigmoid", 0.1, 0.8, middle, width)
    return config(pack_window=256, drop=DropConfig("beta", max=0.9, schedule=schedule), **changes)


def local_moving():
    schedule = LocalDropScheduleConfig("sigmoid", 0.1, 0.8, 10_000, -1_000)
    drop = LocalDropConfig("constant", schedule=schedule)
    return config(
        local=LocalViewsConfig(2, LocalResolutionConfig("side", 16, 96), drop), pack_window=128
    )


@pytest.mark.parametrize(
    ("rules", "epochs"),
    [
        (moving(4_000, -300), 3),  # all at once, within the second epoch
        (moving(6_000, 1_000, max_images_per_pack=4), 3),  # the number of images limits packs
        (local_moving(), 2),
    ],
)
def test_a_drop_rate_that_moves_is_followed_over_the_whole_run(rules, epochs):
    whole = Plan(synthetic_manifest([2000, 1500]), rules, 4, max_epochs=epochs)
    exact = {unit: planned_length(whole, unit, exact_up_to=10**9) for unit in ("steps", "tokens")}
    for unit, length in exact.items():
        assert planned_length(whole, unit, exact_up_to=2_000) == pytest.approx(length, rel=0.04)
    by_first_epoch = epochs * summarise(whole).tokens
    assert by_first_epoch != pytest.approx(exact["tokens"], rel=0.1)


def test_mixing_changes_no_length(manifest):
    plain, mixing = (
        Plan(manifest, config(mix=mix), 2, max_epochs=2) for mix in (MixConfig(), MixConfig(1.0))
    )
    assert planned_length(plain, "tokens") == planned_length(mixing, "tokens")
