"""After kill -9 at any point the same command succeeds, and nothing half-written counts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from data_pipeline.shards.manifest import Manifest
from launch.export import export_run
from launch.recipes.finetune import finetune
from tests.launch.killed import run_killed
from tests.launch.made_runs import make_run
from tests.launch.photos import write_photos
from tests.launch.tiny_export import write_export
from zeta.checkpoint.directory import find_fault
from zeta.models.config import load_pretrained

pytestmark = pytest.mark.slow
EVERY = 4
"""Of the changes that an export makes, each fourth is tried; another export tries others."""


def _export(run: Path, out: Path) -> None:
    export_run(run, out, overwrite=True)


@pytest.mark.parametrize("before", ["nothing", "an export"])
def test_an_export_that_is_killed_at_any_point_is_whole_or_absent(tmp_path, before):
    run, out = make_run(tmp_path / "run", (2, 4)), tmp_path / "out"
    first = 0 if before == "nothing" else 1
    for number in itertools.count(first, EVERY):
        if before == "an export" and not out.exists():
            export_run(run, out, step=2)
        if not run_killed(_export, (run, out), str(tmp_path), number):
            break
        if out.exists():  # no file of it is missing or cut: its checksums are compared
            load_pretrained(out)
        elif before == "an export":
            (kept,) = (path for path in tmp_path.glob(".tmp-out-*-old"))
            load_pretrained(kept)
    assert number > first
    load_pretrained(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


QUIET = ("tracker.wandb.mode=disabled", "data.workers=0", "train.log_every=1")
POINTS = (
    "shards/train/shard-0.*tar",
    r"finetune\.json",
    r"checkpoints/\.tmp-",
    "FINISHED",
    r"\.tmp-export.*config\.json",
)
"""Paths before whose change a fine-tuning is killed, in the order in which it makes them."""


def test_a_fine_tuning_that_is_killed_at_many_points_goes_on_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    export = write_export(tmp_path / "export", ["left", "right"])
    write_photos(tmp_path / "photos", 8, seed=0)
    run = tmp_path / "run"
    settings = [f"run.dir={run}", "train.max_steps=4", "train.checkpoint_every=2", *QUIET]
    arguments = (export, str(tmp_path / "photos"), settings)
    killed = []
    for point in POINTS:
        if run_killed(finetune, arguments, point, 0):
            killed.append(point)
        for folder in (run / "checkpoints").glob("step_*"):
            assert find_fault(folder) is None
        if (run / "export").exists():
            load_pretrained(run / "export")
    finetune(*arguments)
    assert killed == [*POINTS]
    assert (run / "FINISHED").read_text() == "step 4\n"
    load_pretrained(run / "export")
    sets = [Manifest.open(run / "shards" / split) for split in ("train", "val")]
    assert sum(len(manifest.samples) for manifest in sets) == 8 * 3 + 5
    steps = [json.loads(line)["step"] for line in (run / "ledger/rank_00000.jsonl").open()]
    assert steps == [1, 2, 3, 4]
    unfinished = [p for p in run.rglob("*") if ".tmp" in p.name]
    assert not unfinished
