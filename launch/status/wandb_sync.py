"""Sends to W&B what it lacks of a run, into the run's one W&B run (`zeta wandb-sync`).

Sessions that were recorded offline are uploaded by `wandb sync`, in their order. What no session
holds, because W&B was disabled or could not be reached, is sent from metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import yaml

from launch.config.load import ZetaConfig, load_config
from launch.status.snapshot import take_snapshot
from launch.status.state import judge
from zeta.exit_codes import RunError
from zeta.run.directory import RunDir
from zeta.tracking.config import WandbConfig
from zeta.tracking.wandb_mode import has_key, stable_run_id
from zeta.tracking.wandb_sink import Worker, worker_order
from zeta.tracking.wandb_state import begin_state, has_news, read_state

_FINISH_S = 3600.0
"""Longest upload; the user can end it earlier by Ctrl-C."""


def wandb_sync(run_dir: Path) -> int:
    """Upload what W&B lacks; return 0, the exit status.

    Raises:
        ValueError: `run_dir` holds no run, there is no API key, or the upload failed.
        RunError: the run is training, so its session is not complete yet.
    """
    files = RunDir(run_dir)
    if not files.config.is_file() or not files.metrics.is_file():
        raise ValueError(
            f"{run_dir} is not the directory of a run that has logged metrics: give the run's "
            "run.dir (runs/NAME by default)"
        )
    if not has_key(os.environ):
        raise ValueError("no W&B API key was found: type `wandb login`, or set WANDB_API_KEY")
    config = load_config(str(files.config))
    if (status := judge(take_snapshot(run_dir))).state == "running" or _is_sending(files):
        raise RunError(
            f"{run_dir} is training, or still sending ({status.why}), so its session is not "
            "complete yet: wait until the run has ended"
        )
    run_id = stable_run_id(files.wandb_run_id)
    sessions = unsent_sessions(files)
    if any(_begun(session).exists() for session in sessions):
        _leave_to_metrics(files, sessions)
        sessions = []
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
    """Return the folders of offline sessions that were not uploaded, oldest first."""
    records = sorted(files.wandb_files.glob("offline-run-*/*.wandb"))
    return [path.parent for path in records if not _mark(path).exists()]


def sync_command(run_id: str, config: WandbConfig, sessions: list[Path]) -> list[str]:
    """Return the W&B command that uploads sessions to one run, in the given order."""
    command = ["wandb", "sync", "--id", run_id, "--project", config.project]
    if config.entity is not None:
        command += ["--entity", config.entity]
    return [*command, *map(str, sessions)]


def _upload(files: RunDir, sessions: list[Path], command: list[str]) -> None:
    for session in sessions:
        _begun(session).touch()
    print(shlex.join(command), flush=True)
    # -P: a wandb.py in this folder must not stand in for W&B. WANDB_DIR: of W&B's own logs.
    subprocess.run(
        [sys.executable, "-P", "-m", *command],
        stdin=subprocess.DEVNULL,
        env=os.environ | {"WANDB_DIR": str(files.path)},
        check=False,
    )
    failed = [s for s in sessions if not all(_mark(path).exists() for path in s.glob("*.wandb"))]
    if failed:
        raise ValueError(
            f"`wandb sync` did not upload {', '.join(map(str, failed))}; its messages are above. "
            "Type the same command to try again: what W&B lacks is sent from metrics.jsonl"
        )


def _leave_to_metrics(files: RunDir, sessions: list[Path]) -> None:
    """Have metrics.jsonl sent in the place of sessions whose upload was interrupted.

    `wandb sync` would send a session again from its beginning; but W&B is asked for the last step
    that it has before lines are sent.
    """
    print("an upload was interrupted: what W&B lacks is sent from metrics.jsonl", flush=True)
    state = begin_state(files.wandb_state, files.metrics, files.wandb_files)
    state.mode, state.unsure_from = "online", {}
    state.write(files.wandb_state)
    for session in sessions:
        for record in session.glob("*.wandb"):
            _mark(record).touch()


def _send_rest(files: RunDir, config: ZetaConfig, run_id: str) -> None:
    """Run a session that gets its ending at once."""
    order = worker_order(
        replace(config.tracker.wandb, finish_s=_FINISH_S),
        name=config.run.name,
        run_dir=files,
        run_id=run_id,
        run_config=yaml.safe_load(files.config.read_text(encoding="utf-8")),
    )
    worker = Worker(order)
    worker.end("finished" if files.finished.exists() else "stopped")
    worker.start("online")
    try:
        while (status := worker.status) is None:
            time.sleep(0.1)
    finally:
        worker.close()
    if status != 0:
        state = read_state(files.wandb_state)
        trouble = None if state is None else state.trouble
        raise ValueError(f"W&B could not be reached: {trouble or 'its client ended unexpectedly'}")


def _is_sending(files: RunDir) -> bool:
    """Return whether a session of the run is being sent on this machine."""
    with contextlib.suppress(FileNotFoundError), (files.wandb_files / ".lock").open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks: the status of the run must do
            return False
    return False


def _begun(session: Path) -> Path:
    """Return the file that says that an upload of an offline session has begun."""
    return session / "upload-begun"


def _mark(record: Path) -> Path:
    """Return the file that `wandb sync` leaves beside a record once it is uploaded."""
    return record.with_suffix(".wandb.synced")
