"""A run that ends with its data: warm-up, cooldown and schedule follow the steps of its plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.shards.build import build_shards
from launch.recipes.digits import CLASS_NAMES, render_split
from tests.launch.command_line import zeta

SETTINGS = (
    *("demo", "data.shards=shards", "train.max_steps=null", "train.max_epochs=3"),
    *("train.log_every=1", "tracker.wandb.mode=disabled", "data.workers=0"),
    *("train.dtype=fp32", "optim.warmup_share=0.3", "optim.lr=1e-3"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("epochs")
    samples = render_split("train", seed=0)
    build_shards([next(samples) for _ in range(160)], folder / "shards", class_names=CLASS_NAMES)
    return folder


def rates(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["optim/lr"] for line in lines if "optim/lr" in line]


@pytest.mark.slow
def test_warmup_and_cosine_are_those_of_a_run_of_as_many_steps_on_any_ranks(world: Path):
    done = zeta("train", *SETTINGS, "run.dir=epochs", "optim.schedule=cosine", cwd=world)
    assert done.returncode == 0, done.stderr + done.stdout
    by_epochs = rates(world / "epochs")
    steps = len(by_epochs)
    assert max(by_epochs) == by_epochs[round(0.3 * steps) - 1] == 1e-3
    assert by_epochs[-1] < 1e-4
    counted = (f"train.max_steps={steps}", "optim.schedule=cosine", "run.dir=steps")
    done = zeta("launch", "local", *SETTINGS, *counted, "--nproc", "2", cwd=world)
    assert done.returncode == 0, done.stderr + done.stdout
    assert rates(world / "steps") == pytest.approx(by_epochs)
    longer = ("run.dir=epochs", "optim.schedule=cosine", "optim.warmup_share=0.5")
    refused = zeta("train", *SETTINGS, *longer, cwd=world)
    assert refused.returncode == 93
    assert "optim.warmup_share was 0.3 and is now 0.5" in refused.stderr


@pytest.mark.slow
def test_a_warmup_longer_than_the_epochs_is_refused_before_the_run(world: Path):
    refused = zeta("train", *SETTINGS, "optim.warmup_steps=5000", "run.dir=new", cwd=world)
    assert refused.returncode == 93
    assert "optim.warmup_steps + optim.cooldown_steps is 5000; it must be below the" in (
        refused.stderr
    )
    assert "steps of train.max_epochs = 3: lower them or train longer" in refused.stderr
    assert not (world / "new").exists()
