"""Runs whose images are augmented and mixed: the same on any ranks and after any stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.shards.build import build_shards
from launch.recipes.digits import CLASS_NAMES, render_split
from tests.launch.command_line import zeta

SETTINGS = (
    *("demo", "data.shards=shards", "train.packs_per_step=4", "train.log_every=1"),
    *("train.max_steps=6", "optim.schedule=constant", "train.checkpoint_every=3"),
    *("tracker.wandb.mode=disabled", "data.workers=0", "train.dtype=fp32"),
    *("data.augment.rand_augment.layers=2", "data.mix.mixup_alpha=0.8"),
    *("data.mix.cutmix_alpha=1", "objective.label_smoothing=0.1", "model.stochastic_depth=0.1"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards and a finished run on one rank."""
    folder = tmp_path_factory.mktemp("augmented")
    samples = render_split("train", seed=0)
    build_shards([next(samples) for _ in range(200)], folder / "shards", class_names=CLASS_NAMES)
    done = zeta("train", *SETTINGS, "run.dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


def metrics(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "train/loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["train.tokens_per_forward=1024", "data.workers=1"])
def test_two_ranks_and_a_stop_train_the_same_run(world: Path, setting: str):
    run = f"run.dir=two_{setting}"
    begun = zeta("train", *SETTINGS, run, setting, "train.max_steps=3", cwd=world)
    assert begun.returncode == 0, begun.stderr + begun.stdout
    done = zeta("launch", "local", *SETTINGS, run, setting, "--nproc", "2", cwd=world)
    assert done.returncode == 0, done.stderr + done.stdout
    whole, parts = metrics(world / "run"), metrics(world / f"two_{setting}")
    assert len(whole) == len(parts) == 6
    for one, other in zip(whole, parts, strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], abs=1e-5)
        assert other["train/top1"] == pytest.approx(one["train/top1"])


@pytest.mark.slow
def test_another_mixture_is_another_run(world: Path):
    changes = ("data.mix.mixup_alpha=0.1", "data.augment.rand_augment.magnitude=3")
    refused = zeta("train", *SETTINGS, "run.dir=run", *changes, cwd=world)
    assert refused.returncode == 93
    assert "data.mix.mixup_alpha was 0.8 and is now 0.1" in refused.stderr
    assert "data.augment.rand_augment.magnitude was 9" in refused.stderr


@pytest.mark.slow
def test_a_report_shows_its_first_pack(world: Path):
    report = zeta("report", "run", cwd=world)
    assert report.returncode == 0, report.stderr
