"""Runs on a machine whose clock jumps back, or that has no room for one file alone."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.shards.build import build_shards
from launch.cli import entry_point
from launch.status.snapshot import take_snapshot
from launch.status.state import judge
from tests.data_pipeline.shard_fixtures import jpeg
from tests.launch.killed import run_apart
from zeta import metric_names as names
from zeta.exit_codes import ExitCode
from zeta.packed import StepPacks
from zeta.run.heartbeat import read_heartbeats
from zeta.run.jsonl import JsonlFile
from zeta.run.ledger import Ledger

pytestmark = pytest.mark.slow


def jump_back() -> None:
    """Set the clock back by an hour in the third step."""
    real, write, jumps = time.time, Ledger.write, list[float]()

    def write_and_jump(self: Ledger, step: int, packs: StepPacks, skipped: bool) -> None:
        if step == 3:
            jumps.append(3600.0)
            time.sleep(1.0)  # a few heartbeats
        write(self, step, packs, skipped)

    Ledger.write = write_and_jump  # type: ignore[method-assign]
    time.time = lambda: real() - sum(jumps)


def refuse_the_ledger() -> None:
    """Leave no room for the ledger while there is a file `full` here."""
    hand_over = JsonlFile._hand_over

    def refuse(self: JsonlFile) -> None:
        if Path("full").exists() and "ledger" in str(self._file.name) and self._unwritten:
            raise OSError(errno.ENOSPC, "No space left on device", str(self._file.name))
        hand_over(self)

    JsonlFile._hand_over = refuse  # type: ignore[method-assign]


@pytest.fixture
def shards(tmp_path):
    samples = [
        (f"s{i}", {"jpg": jpeg(24, 24 + i, i), "cls": str(i % 2).encode()}) for i in range(12)
    ]
    build_shards(samples, tmp_path / "shards", class_names=["a", "b"])
    return tmp_path / "shards"


def train(folder: Path, fault: Callable[[], None], steps: int = 6) -> int:
    settings = ["data.shards=shards", "run.dir=run", f"train.max_steps={steps}"]
    settings += ["train.checkpoint_every=2", "train.log_every=1", "data.workers=0"]
    settings += ["train.watchdog.heartbeat_s=0.2", "optim.warmup_steps=1"]
    settings += ["tracker.wandb.mode=disabled", "data.token_budget=256", "model.depth=1"]
    return run_apart(_train, folder, fault, settings)


def _train(folder: Path, fault: Callable[[], None], settings: list[str]) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    os.chdir(folder)
    stderr = os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stderr, 2)
    torch.set_num_threads(1)
    fault()
    sys.exit(entry_point(["train", "demo", *settings]))


def rows(folder: Path):
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").open()]


def test_a_clock_that_jumps_back_changes_neither_metrics_nor_watchdog_nor_status(shards, tmp_path):
    assert train(tmp_path, jump_back) == 0
    steps = [row for row in rows(tmp_path) if names.STEP_S in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert all(0 < row[names.STEP_S] < 60 and row[names.IMAGES_PER_S] > 0 for row in steps)
    (beat,) = read_heartbeats(tmp_path / "run/heartbeat")
    assert beat.phase == "ended"
    assert judge(take_snapshot(tmp_path / "run")).state == "finished"
    later = [*(tmp_path / "run").rglob("*")]
    for path in later:  # its files are of the future by the clock of the next start
        os.utime(path, (time.time() + 3600,) * 2)
    assert train(tmp_path, jump_back, steps=8) == 0
    assert (tmp_path / "run/FINISHED").read_text() == "step 8\n"


def test_no_room_for_the_ledger_alone_saves_nothing_that_it_does_not_hold(shards, tmp_path):
    full = tmp_path / "full"
    full.touch()
    assert train(tmp_path, refuse_the_ledger) not in (0, ExitCode.NEVER_RESTART)
    said = (tmp_path / "stderr").read_text()
    assert "No space left on device" in said
    assert "Traceback" not in said
    full.unlink()
    assert train(tmp_path, refuse_the_ledger) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/ledger/rank_00000.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    seen = rows(tmp_path)[-1]["data/images_seen"]
    assert sum(line["images"] for line in lines) == seen
