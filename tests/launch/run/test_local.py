"""`launch_local`: what is refused before any rank starts, restarts, and the status of a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import launch.run.local
from data_pipeline.shards.build import build_shards
from launch.run.local import combined_exit_code, launch_local
from launch.run.ranks import Outcome
from launch.status.audit import audit_run
from tests.data_pipeline.shard_fixtures import jpeg
from tests.launch.restart_table import TABLE, Case
from zeta.run.directory import RunDir


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([], 0),
        ([1, 93, 85], 93),
        ([1, 85, 130], 85),
        ([7, 130], 130),
        ([0, 7, 3], 7),
        ([0, -signal.SIGKILL], 137),
        ([-signal.SIGTERM, 85], 85),
        ([-signal.SIGTERM, -signal.SIGKILL], 85),  # told to leave before it could note that
        ([0, -signal.SIGUSR1], 85),
        ([1, -signal.SIGUSR2], 85),
        ([-signal.SIGTERM, 93], 93),
    ],
)
def test_the_status_that_asks_for_most_care_wins(codes, expected):
    assert combined_exit_code(codes) == expected


def test_a_wrong_config_is_said_once_before_any_rank_starts(capfd):
    with pytest.raises(ValueError, match=r"did you mean optim\.lr"):
        launch_local("demo", ["data.shards=x", "train.lr=1"], 2)
    assert capfd.readouterr() == ("", "")


def test_more_ranks_than_packs_are_refused(capfd):
    with pytest.raises(ValueError, match=r"3 ranks .* train\.packs_per_step is 2"):
        launch_local("demo", ["data.shards=x", "train.packs_per_step=2"], 3)
    assert capfd.readouterr() == ("", "")


class Ranks:
    """Stands in for `run_ranks`: each start ends as the table says."""

    def __init__(self, ends, run_dir: RunDir, *, signalled: bool = False) -> None:
        self.ends, self.run_dir, self.signalled = ends, run_dir, signalled
        self.starts = 0

    def __call__(self, command, nproc) -> Outcome:
        code, saves = self.ends[self.starts]
        self.starts += 1
        if saves:
            self.run_dir.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.run_dir.checkpoints / "latest").write_text(f"step_{self.starts:08d}\n")
        return Outcome((code, 0), frozenset(), aborted=False, signalled=self.signalled)


@pytest.fixture
def run_dir(tmp_path, monkeypatch) -> RunDir:
    run_dir = RunDir(tmp_path)
    start = SimpleNamespace(run_dir=run_dir, already_finished=None)
    monkeypatch.setattr(launch.run.local, "check_start", lambda config, nproc: start)
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_restarts_follow_the_rule_of_the_batch_script(case: Case, run_dir, monkeypatch):
    ranks = Ranks(case.ends, run_dir)
    monkeypatch.setattr(launch.run.local, "run_ranks", ranks)
    status = launch_local("demo", ["data.shards=x"], 2, case.max_restarts)
    assert (ranks.starts, status) == (case.starts, case.status)


def test_a_run_that_is_given_up_says_how_often_it_was_tried(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(
        launch.run.local, "run_ranks", Ranks([(1, True), *[(1, False)] * 3], run_dir)
    )
    launch_local("demo", ["data.shards=x"], 2)
    told = capsys.readouterr().err
    assert "restart 1 of at most 100, from step_00000001" in told
    assert "giving up after 3 starts in a row without a new checkpoint" in told


@pytest.mark.parametrize("code", [85, 1, -signal.SIGTERM])
def test_a_run_that_was_asked_to_stop_is_not_started_again(code, run_dir, monkeypatch):
    ranks = Ranks([(code, True), (0, True)], run_dir, signalled=True)
    monkeypatch.setattr(launch.run.local, "run_ranks", ranks)
    assert launch_local("demo", ["data.shards=x"], 2) == combined_exit_code([code])
    assert ranks.starts == 1


@pytest.mark.parametrize("code", [85, 1])
def test_without_restarts_the_status_of_the_ranks_is_that_of_the_command(
    code, run_dir, monkeypatch
):
    monkeypatch.setattr(launch.run.local, "run_ranks", Ranks([(code, True)], run_dir))
    assert launch_local("demo", ["data.shards=x"], 2, max_restarts=0) == code


@pytest.mark.slow
def test_a_killed_rank_restarts_the_run_and_every_image_is_trained_on_once(tmp_path):
    samples = [
        (f"s{i}", {"jpg": jpeg(40, 32 + 8 * (i % 5), i), "cls": str(i % 3).encode()})
        for i in range(60)
    ]
    build_shards(samples, tmp_path / "shards", class_names=["a", "b", "c"])
    run_dir = RunDir(tmp_path / "run")
    settings = [f"data.shards={tmp_path / 'shards'}", f"run.dir={run_dir.path}"]
    settings += ["data.token_budget=256", "data.max_images_per_pack=16", "train.packs_per_step=2"]
    settings += ["train.max_steps=null", "train.max_epochs=12", "optim.schedule=constant"]
    settings += ["optim.warmup_share=0"]
    settings += ["train.checkpoint_every=10", "train.log_every=1", "tracker.wandb.mode=disabled"]
    command = [sys.executable, "-m", "launch", "launch", "local", "demo", "--nproc", "2", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=-1, text=True)
    _wait_for_step(run_dir, 12, process)
    victim = json.loads(run_dir.rank_heartbeat(1).read_text())["pid"]
    os.kill(victim, signal.SIGKILL)
    told = process.communicate(timeout=200)[1]
    assert process.returncode == 0, told
    assert f"rank 1 was ended by SIGKILL; see {run_dir.rank_log(1)}" in told
    assert "restart 1 of at most 100, from step_" in told
    audit = audit_run(str(run_dir.path))
    assert audit.exact
    assert audit.uncommitted == 0
    assert {account.open for account in audit.epochs} == {0}


def _wait_for_step(run_dir: RunDir, step: int, launcher: subprocess.Popen) -> None:
    """Wait until a process that runs now has logged the step and published a checkpoint."""
    deadline, latest = time.monotonic() + 200, run_dir.checkpoints / "latest"
    while not latest.exists() or _last_step(run_dir.metrics) < step:
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _last_step(metrics: Path) -> int:
    lines = metrics.read_text().splitlines()
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
