"""`zeta wandb-sync`: one W&B run out of offline sessions and what no session holds."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import launch.status.wandb_sync
from launch.config.load import load_config, to_yaml
from launch.run.lock import RunLock, this_owner
from launch.status.wandb_sync import sync_command, unsent_sessions, wandb_sync
from tests.zeta.tracking.wandb_jobs import FakeTraining
from tests.zeta.tracking.wandb_server import wandb_server
from zeta.exit_codes import RunError
from zeta.run.directory import RunDir
from zeta.tracking.config import WandbConfig


def _run(tmp_path, *steps):
    files = RunDir(tmp_path / "a run")
    files.path.mkdir()
    files.config.write_text(to_yaml(load_config("demo", ["data.shards=x"])))
    rows = [{"step": step, "train/loss": 1.0, "data/images_seen": step} for step in steps]
    files.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def _sync(files, environment):
    return subprocess.run(
        [sys.executable, "-m", "launch", "wandb-sync", str(files.path)],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_offline_sessions_and_what_no_session_holds_become_one_run_once(tmp_path):
    files = _run(tmp_path)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    clean |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    for first in (1, 3):
        training = FakeTraining(
            files.path, clean, wandb={"mode": "offline"}, resumed_step=first - 1
        )
        training.log(first)
        training.log(first + 1)
        training.close("stopped")
    with files.metrics.open("a") as metrics:
        metrics.write('{"step": 5, "train/loss": 0.5, "data/images_seen": 40}\n')
    with wandb_server() as server:
        environment = clean | server.environment(tmp_path)
        done = _sync(files, environment)
        assert done.returncode == 0, done.stderr
        run_id = files.wandb_run_id.read_text().strip()
        assert done.stdout.startswith(f"wandb sync --id {run_id} --project zeta '{files.path}")
        again = _sync(files, environment)
        assert (again.returncode, again.stdout) == (
            0,
            f"W&B has all of {files.path}: nothing to send\n",
        )
        (run,) = server.runs.values()
        assert [step for step, _ in run.history("train/loss")] == [1, 2, 3, 4, 5]
        assert run.summary["train/loss"]["min"] == 0.5


@pytest.mark.slow
def test_after_kill_9_of_uploads_the_same_command_sends_everything_once(tmp_path):
    files = _run(tmp_path)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    clean |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    training = FakeTraining(files.path, clean, wandb={"mode": "offline"}, resumed_step=0)
    for step in (1, 2):
        training.log(step)
    training.close("stopped")
    with files.metrics.open("a") as metrics:
        metrics.write('{"step": 3, "train/loss": 0.5, "data/images_seen": 40}\n')
    with wandb_server() as server:
        environment = clean | server.environment(tmp_path)
        for requests in (1, 4, 8):
            _kill_after(requests, server, files, environment)
        deadline = time.monotonic() + 90
        while (done := _sync(files, environment)).returncode != 0:
            assert "still sending" in done.stderr  # what the killed one had begun
            assert time.monotonic() < deadline
        (run,) = server.runs.values()
        assert [step for step, _ in run.history("train/loss")] == [1, 2, 3]
        assert "nothing to send" in _sync(files, environment).stdout


def _kill_after(requests, server, files, environment):
    """Begin an upload, and kill it once it has sent some requests."""
    began = server.requests
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", "wandb-sync", str(files.path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while server.requests < began + requests and process.poll() is None:
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_it_does_nothing_without_a_run_a_key_or_a_run_that_has_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ValueError, match="not the directory of a run"):
        wandb_sync(tmp_path)
    files = _run(tmp_path, 1)
    with pytest.raises(ValueError, match="no W&B API key"):
        wandb_sync(files.path)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    RunLock(files, this_owner({}, 5.0)).acquire()
    with pytest.raises(RunError, match="is training"):
        wandb_sync(files.path)


def test_sessions_are_sent_in_the_order_of_their_start_and_only_once(tmp_path):
    files = RunDir(tmp_path)
    for name in ("offline-run-20260102_000000-x", "offline-run-20260101_000000-x", "run-2026-x"):
        folder = files.wandb_files / name
        folder.mkdir(parents=True)
        (folder / "run-x.wandb").touch()
    sessions = unsent_sessions(files)
    assert [path.name[12:20] for path in sessions] == ["20260101", "20260102"]
    command = sync_command("x", WandbConfig(project="p", entity="e"), sessions)
    assert command[:8] == ["wandb", "sync", "--id", "x", "--project", "p", "--entity", "e"]
    assert command[8:] == [str(path) for path in sessions]
    (sessions[0] / "run-x.wandb.synced").touch()
    assert unsent_sessions(files) == sessions[1:]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_does_not_hold_up_the_upload(tmp_path, monkeypatch, number):
    def refuse(stream, operation):
        raise OSError(number, os.strerror(number))

    files = RunDir(tmp_path)
    files.wandb_files.mkdir()
    (files.wandb_files / ".lock").touch()
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert launch.status.wandb_sync._is_sending(files) is False
