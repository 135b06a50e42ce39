"""Memory is predicted from a pack as large, dropped patches included, as packs of the run get."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest

from data_pipeline.shards.build import build_shards
from launch.config.load import load_config
from launch.config.resolve import training_plan
from launch.run.checks import check_start
from launch.run.execution import costliest_pack, run_memory
from tests.data_pipeline.shard_fixtures import jpeg
from tests.launch.tiny_export import write_export

RISING = (
    *("data.drop.kind=beta", "data.drop.max=0.9", "data.drop.schedule.kind=sigmoid"),
    *("data.drop.schedule.low=0.1", "data.drop.schedule.high=0.7"),
    *("data.drop.schedule.middle=1e6", "data.drop.schedule.width=1e5"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("costliest")
    sides = [(16 + 8 * (i % 9), 16 + 8 * (i % 5)) for i in range(240)]
    images = [(f"s{i}", {"jpg": jpeg(*size, i)}) for i, size in enumerate(sides)]
    build_shards(images, folder / "shards")
    write_export(folder / "teacher", ["a"], patch_size=12, dim=24, pool="cls")
    return folder


def checked(world, *settings):
    fixed = (
        *(f"data.shards={world / 'shards'}", f"run.dir={world / 'run'}", "train.packs_per_step=2"),
        *("objective.kind=distill", "objective.label_smoothing=0", "data.drop.keep=true"),
        *("data.token_budget=256", "data.resolution.kind=native", "data.resolution.max=96"),
        f"objective.distill.teacher={world / 'teacher'}",
    )
    return check_start(load_config("demo", [*fixed, *settings]), 1)


def late_packs(run, most=60):
    """The first packs of a lane as they are where the schedule has risen."""
    drop = run.config.data.drop
    high = replace(drop, schedule=replace(drop.schedule, middle=-1e9))
    plan = training_plan(
        replace(run.config, data=replace(run.config.data, drop=high)), run.manifest
    )
    return list(islice(plan.lane(0), most))


def whole_patches(batch):
    return batch.num_tokens - batch.prefix_tokens * batch.num_images + len(batch.dropped_patches)


def test_the_pack_is_one_of_the_time_when_most_patches_are_dropped(world):
    run = checked(world, *RISING)
    late = [int((pack.rows * pack.columns).sum()) for pack in late_packs(run)]
    early = [int((pack.rows * pack.columns).sum()) for pack in islice(run.plan.lane(0), 60)]
    assert whole_patches(costliest_pack(run)) >= max(late) > max(early)


def test_the_predicted_memory_grows_with_the_highest_rate_that_comes(world):
    rising = run_memory(run := checked(world, *RISING), costliest_pack(run)).activations.peak
    level = ("data.drop.schedule.kind=none", "data.drop.rate=0.1")
    still = run_memory(run := checked(world, *RISING, *level), costliest_pack(run))
    assert rising > 1.05 * still.activations.peak
