"""Need, supply, what binds and how long it takes, before a run."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from data_pipeline.config import DropConfig, DropScheduleConfig
from data_pipeline.plan.length import planned_length
from data_pipeline.plan.plan import Plan
from data_pipeline.plan.summary import summarise
from data_pipeline.supply import Supply
from launch.config.load import load_config
from launch.run.checks import check_start
from launch.run.length import length_by_plan, length_rows
from launch.run.pace import Forecast, forecast, logged_mfu, pace_rows, run_length
from tests.data_pipeline.synthetic import config, synthetic_manifest
from tests.launch.run.test_checks import _shards
from zeta.train.config import TrainConfig
from zeta.train.hardware import accelerator
from zeta.train.pace import Pace, expected_mfu, predicted_pace


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pace")
    settings = [f"data.shards={_shards(folder, 40)}", f"run.dir={folder / 'run'}"]
    settings += ["train.max_steps=100", "optim.warmup_steps=1", "data.token_budget=64"]
    return check_start(load_config("demo", settings), 1)


def rows(need, supply, workers, images=None, world_size=1):
    pack = SimpleNamespace(num_images=1)
    found = Forecast(
        None if need is None else Pace(need, 0.3, "measured on an H200"),
        None if supply is None else Supply(supply, 256, pack),
        workers,
    )
    return dict(pace_rows(found, world_size, images))


def test_the_slower_of_gpu_and_loader_binds_and_the_loader_says_what_to_change():
    slow = rows(10_000, 500, 4)
    assert slow["need"].startswith("10,000 images/s of a rank, at MFU 0.30 (measured on an H200)")
    assert slow["supply"].startswith("2,000 images/s of a rank: 4 workers, 500 a process")
    assert slow["binds"].startswith("the loader, which gives 20% of what the GPU takes: more cores")
    assert rows(1_000, 500, 4)["binds"] == "the GPU: the loader gives 2 times what it takes"
    assert rows(1_000, 500, 0)["supply"].startswith("500 images/s of a rank: the training process")


def test_the_supply_says_how_many_processes_were_measured_at_a_time():
    supply = Supply(500, 256, SimpleNamespace(num_images=1), processes=4)
    found = dict(pace_rows(Forecast(None, supply, 4), 1, None))
    assert found["supply"].endswith("measured on 256 images here, 4 at a time")
    assert rows(None, 500, 1)["supply"].endswith("measured on 256 images here")


def test_the_time_is_that_of_what_binds():
    assert rows(10_000, 500, 4, images=2_000 * 3600 * 24 * 8, world_size=2)["time"].startswith(
        "4.0 days on 2 ranks, 192.0 GPU-hours"
    )
    assert rows(100, 500, 4, images=100 * 600)["time"].startswith("10.0 minutes on 1 ranks")
    assert "time" not in rows(100, 500, 4)


def test_what_is_not_known_is_said():
    assert rows(None, 500, 1)["need"].startswith("not known without the GPU")
    assert "binds" not in rows(None, 500, 1)
    assert rows(1_000, None, 1)["supply"].startswith("not measured")


def test_a_run_is_measured_on_its_own_shards_and_model(checked):
    found = forecast(checked, accelerator("h100"))
    assert found.supply is not None
    assert found.supply.images_per_s > 0
    assert found.need is not None
    model_flops = found.need.mfu * 67e12 / found.need.images_per_s  # the demo trains in fp32
    assert 1e6 < model_flops < 1e9
    assert forecast(checked, None).need is None


def test_the_length_counts_what_is_done(checked):
    length = run_length(checked, 1)
    assert length.steps == 100
    assert length.images_left == pytest.approx(100 * length.images_per_step)


def test_the_plan_says_the_epochs_and_the_time_of_the_run(checked):
    summary = summarise(checked.plan)
    length = length_by_plan(checked.config.train, checked.plan, summary)
    images = 100 * length.images_per_step
    said = dict(length_rows(length, None))
    assert said["the run"] == f"100 steps: {images / 40:.3g} epochs, {images:,.0f} images"
    assert "--images-per-s" in said["time"]
    assert dict(length_rows(length, images / 600))["time"].startswith("10.0 minutes at ")
    by_epochs = replace(checked.config.train, max_steps=None, max_epochs=3)
    whole = replace(checked.plan, max_epochs=3)
    length = length_by_plan(by_epochs, whole, summarise(whole))
    assert length.steps == planned_length(whole, "steps")
    assert length.epochs == pytest.approx(3, rel=0.1)
    endless = replace(by_epochs, max_epochs=None)
    said = dict(length_rows(length_by_plan(endless, checked.plan, summary), 9.0))
    assert list(said) == ["the run"]
    assert "train.max_steps" in said["the run"]


def test_every_limit_gives_the_length_at_a_drop_rate_that_moves():
    schedule = DropScheduleConfig("sigmoid", 0.1, 0.8, 6_000, 500)
    rules = config(pack_window=256, drop=DropConfig("beta", max=0.9, schedule=schedule))
    plan = Plan(synthetic_manifest([2000, 1500]), rules, 4)
    summary = summarise(plan)
    steps = 500
    packs = [lane.next_pack() for lane in map(plan.lane, range(4)) for _ in range(steps)]
    images = sum(len(pack.lengths) for pack in packs)
    tokens = sum(int(pack.lengths.sum()) for pack in packs)
    assert summary.images_per_pack * 4 * steps < 0.7 * images  # the first epoch tells little
    for limit in ({"max_steps": steps}, {"max_images": images}, {"max_tokens": tokens}):
        train = TrainConfig(**limit, packs_per_step=4)
        length = length_by_plan(train, plan, summary)
        assert length.steps == pytest.approx(steps, rel=0.05)
        assert length.images == pytest.approx(images, rel=0.05)


def test_the_utilisation_of_the_run_itself_wins(tmp_path):
    assert logged_mfu(tmp_path) is None
    lines = [
        f'{{"step": {step}, "throughput/mfu": {0.2 + 0.1 * (step > 5)}}}' for step in range(40)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "config.yaml").write_text("run: {name: a}\n")
    assert logged_mfu(tmp_path) == pytest.approx(0.3)
    assert predicted_pace(1e9, 989, 768, 0.3).images_per_s == pytest.approx(0.3 * 989e3)
    assert predicted_pace(1e9, 989, 768).source == "measured on an H200"
    assert (expected_mfu(192), expected_mfu(5000)) == (0.08, 0.38)


def test_a_run_that_waited_for_data_is_not_taken_for_a_slow_gpu(tmp_path):
    row = {"throughput/mfu": 0.1, "data/supply_ratio": 0.25}
    lines = (json.dumps({"step": step} | row) + "\n" for step in range(9))
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert logged_mfu(tmp_path) == pytest.approx(0.4)


def test_tokens_of_a_step_do_not_depend_on_the_ranks(checked):
    found = {world_size: run_length(checked, world_size) for world_size in (1, 2)}
    assert found[1].tokens_per_step == pytest.approx(found[2].tokens_per_step)
