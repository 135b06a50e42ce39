"""`zeta wandb-sync`: what W&B does not have of a run goes there, into the run's one W&B run.

Sessions that were recorded offline are uploaded by `wandb sync`, in their order. What no session
holds (W&B was disabled, or never came to it) is in metrics.jsonl and is sent from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

from launch.config.load import ZetaConfig, load_config
from launch.status.snapshot import take_snapshot
from launch.status.state import judge
from zeta.exit_codes import RunError
from zeta.run.directory import RunDir
from zeta.tracking.config import WandbConfig
from zeta.tracking.wandb_mode import has_key, stable_run_id
from zeta.tracking.wandb_sink import Ending, Worker, worker_order
from zeta.tracking.wandb_state import begin_state, has_news, read_state

_FINISH_S = 3600.0
"""Somebody waits for it, and can end it."""


def wandb_sync(run_dir: Path) -> int:
    """Upload what is missing; return 0 if all went well.

    Raises:
        ValueError: no run, nothing to log in with, or the upload did not work.
        RunError: the run is training, and its session is not whole yet.
    """
    files = RunDir(run_dir)
    if not files.config.is_file() or not files.metrics.is_file():
        raise ValueError(
            f"{run_dir} is not the directory of a run that has logged something: give its run.dir, "
            "which is runs/NAME unless set"
        )
    if not has_key(os.environ):
        raise ValueError("no W&B API key was found: type `wandb login`, or set WANDB_API_KEY")
    config = load_config(str(files.config))
    if (status := judge(take_snapshot(run_dir))).state == "running" or _is_sending(files):
        raise RunError(
            f"{run_dir} is training, or still sending ({status.why}): its session is not whole "
            "yet; wait until it has ended"
        )
    run_id = stable_run_id(files.wandb_run_id)
    sessions = unsent_sessions(files)
    if sessions:
        _upload(files, sessions, sync_command(run_id, config.tracker.wandb, sessions))
    state = begin_state(files.wandb_state, files.metrics, files.wandb_files)
    cut_short = state.mode == "online" and state.unsure_from is not None
    rest = cut_short or has_news(state, files.metrics)
    if rest:
        print("sending the rest from metrics.jsonl ...", flush=True)
        _send_rest(files, config, run_id)
    if not sessions and not rest:
        print(f"W&B has all of {run_dir}: nothing to send")
    return 0


def unsent_sessions(files: RunDir) -> list[Path]:
    """Return the folders of sessions that were recorded offline and not uploaded, oldest first."""
    records = sorted(files.wandb_files.glob("offline-run-*/*.wandb"))
    return [path.parent for path in records if not _mark(path).exists()]


def sync_command(run_id: str, config: WandbConfig, sessions: list[Path]) -> list[str]:
    """Return the W&B command that adds sessions, in the order of their start, to one run."""
    command = ["wandb", "sync", "--id", run_id, "--project", config.project]
    if config.entity is not None:
        command += ["--entity", config.entity]
    return [*command, *map(str, sessions)]


def _upload(files: RunDir, sessions: list[Path], command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    # -P: a wandb.py in this folder must not stand in for W&B, whose log goes to the others.
    subprocess.run(
        [sys.executable, "-P", "-m", *command],
        stdin=subprocess.DEVNULL,
        env=os.environ | {"WANDB_DIR": str(files.path)},
        check=False,
    )
    failed = [s for s in sessions if not all(_mark(path).exists() for path in s.glob("*.wandb"))]
    if failed:
        raise ValueError(
            f"`wandb sync` did not upload {', '.join(map(str, failed))}; what it said is above. "
            "The same command tries again, and sends nothing twice"
        )


def _send_rest(files: RunDir, config: ZetaConfig, run_id: str) -> None:
    """Run a session that knows from its start how training ended."""
    order = worker_order(
        config.tracker.wandb,
        name=config.run.name,
        run_dir=files,
        run_id=run_id,
        run_config=yaml.safe_load(files.config.read_text(encoding="utf-8")),
        finish_s=_FINISH_S,
    )
    worker = Worker(order)
    worker.end(Ending("finished" if files.finished.exists() else "stopped"))
    worker.start("online")
    if worker.wait() != 0:
        state = read_state(files.wandb_state)
        trouble = None if state is None else state.trouble
        raise ValueError(f"W&B could not be reached: {trouble or 'its client ended unexpectedly'}")


def _is_sending(files: RunDir) -> bool:
    """Whether a session of the run is being sent on this machine."""
    with contextlib.suppress(FileNotFoundError), (files.wandb_files / ".lock").open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _mark(record: Path) -> Path:
    """Return what `wandb sync` leaves beside a record that it has uploaded."""
    return record.with_suffix(".wandb.synced")
