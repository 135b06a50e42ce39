"""Takes a snapshot of a run: reads its directory, and asks squeue. Nothing is written.

Files of a running job may end at any byte, or be missing; what can be read is used.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from launch.config.yaml_text import parse_yaml
from launch.run.lock import last_owner, lives_here
from launch.slurm_queries import SlurmUnavailableError, ask_queue
from launch.status.state import Limits, QueueEntry, Snapshot, silence_s
from zeta.run.directory import RunDir
from zeta.run.heartbeat import read_heartbeats

_TAIL_BYTES = 2**18
_LOG_TAIL_BYTES = 2**15
_MOST_LOGS = 16
"""Number of logs searched for errors, those written to last."""
_SQUEUE_S = 10.0
_WATCHED_BEATS = 2.0
"""Heartbeats that a rank has time for while it is watched."""
_LOOK_S = 0.5
_ERROR = re.compile(
    r"^(?:\[[^\]]*\]:? )?(?:zeta: (?:job \d+: (?:giving up|ended with)|error|rank \d+ )|"
    r"(?:slurmstepd|srun|sbatch): error:|[\w.]*(?:Error|Exception)\b:?)"
)
_ENDINGS = ("zeta: finished", "zeta: stopped as asked", "zeta: error")


def take_snapshot(path: Path) -> Snapshot:
    """Return what can be seen of a run now.

    Raises:
        ValueError: `path` is not a run directory.
    """
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a folder: give the directory of a run (its run.dir), such as runs/demo"
        )
    files = RunDir(path)
    if not files.is_marked():
        raise ValueError(
            f"{path} is not the directory of a run: give its run.dir (runs/NAME by default)"
        )
    config = _config(files.config)
    owner = last_owner(files)
    queue_known, job = _ask_queue(files, None if owner is None else owner.job)
    step, saved_at = _newest_checkpoint(files.checkpoints)
    heartbeat_s = float(_setting(config, "train.watchdog.heartbeat_s") or 5.0)
    alive = None if owner is None else lives_here(owner)
    # On this machine there is one clock, and the process itself can be asked.
    elsewhere = owner is not None and not owner.released and alive is None
    return Snapshot(
        time=_time_of_ranks(files.heartbeats, heartbeat_s) if elsewhere else time.time(),
        name=str(_setting(config, "run.name") or path.name),
        rows=tuple(_rows(files.metrics)),
        limits=_limits(config, str(files.config)),
        beats=tuple(read_heartbeats(files.heartbeats)),
        heartbeat_s=heartbeat_s,
        finished=_text(files.finished),
        checkpoint_step=step,
        checkpoint_time=saved_at,
        owner=owner,
        owner_alive=alive,
        starts=_count_lines(files.starts),
        stalled=_stalled(files),
        job=job,
        queue_known=queue_known,
        quarantined=_count_lines(files.quarantine),
        last_words=_last_words(files.rank_log(0)),
        error=_last_error(files.logs),
    )


def _time_of_ranks(folder: Path, heartbeat_s: float) -> float:
    """Return the time by the clock of the ranks, as far as it matters whether they are silent.

    Clocks differ between machines: by one that is a minute ahead, every rank would seem stuck, and
    by one that is behind a dead one alive. If the newest heartbeat seems too old, or of the future,
    it is watched until it changes, which tells the time there.
    """
    now, newest = time.time(), _newest_beat(folder)
    limit_s = silence_s(heartbeat_s)
    if newest is None or 0 <= now - newest < limit_s:
        return now
    deadline = time.monotonic() + _WATCHED_BEATS * heartbeat_s
    while time.monotonic() < deadline:
        time.sleep(min(_LOOK_S, heartbeat_s / 4))
        if (beat := _newest_beat(folder)) is not None and beat != newest:
            return beat
    return max(now, newest + limit_s)


def _newest_beat(folder: Path) -> float | None:
    beats = (beat.time for beat in read_heartbeats(folder) if beat.phase != "ended")
    return max(beats, default=None)


def _config(path: Path) -> dict[str, Any]:
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError):
        return {}


def _setting(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _limits(config: dict[str, Any], config_path: str) -> Limits:
    ends = {u: _setting(config, f"train.max_{u}") for u in ("steps", "images", "tokens", "epochs")}
    per_epoch = None if ends["epochs"] is None else _images_per_epoch(config_path)
    return Limits(**ends, images_per_epoch=per_epoch)


@lru_cache(maxsize=1)
def _images_per_epoch(config_path: str) -> float | None:
    """Return the number of images of an epoch, or None if the shards cannot be read."""
    from data_pipeline.shards.weighted import (
        open_shards,  # loads torch, which nothing else here needs
    )
    from launch.config.load import load_config
    from launch.config.resolve import resolve_with_shards, training_plan

    try:
        config = load_config(config_path)
        manifest = open_shards(config.data.shards)
        plan = training_plan(resolve_with_shards(config, manifest), manifest)
    except (OSError, ValueError):
        return None
    return float(plan.masses.usable.sum())


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in _tail(path, _TAIL_BYTES):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def _newest_checkpoint(folder: Path) -> tuple[int | None, float | None]:
    """Return step and time of the newest checkpoint; unfinished ones have other names."""
    paths = sorted(folder.glob("step_[0-9]*")) if folder.is_dir() else []
    for path in reversed(paths):
        manifest = path / "manifest.json"
        try:
            return int(path.name.removeprefix("step_")), manifest.stat().st_mtime
        except (OSError, ValueError):
            continue  # being removed, or damaged
    return None, None


def _stalled(files: RunDir) -> int | None:
    words = (_text(files.slurm_restarts) or "").split()
    return int(words[0]) if words and words[0].isdecimal() else None


def _count_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def _last_words(log: Path) -> str | None:
    """Return the last line in which rank 0 logged how it ended, if it did not start again since."""
    last = None
    for line in _tail(log, _LOG_TAIL_BYTES):
        if line.startswith("run directory: "):
            last = None  # it started again
        elif line.startswith(_ENDINGS):
            last = line
    return last


def _last_error(folder: Path) -> str | None:
    """Return the last error line, with its file, from the log that was written to last."""
    logs = [(path.stat().st_mtime, path) for path in folder.glob("*.log")]
    for _, path in sorted(logs, reverse=True)[:_MOST_LOGS]:
        found = [line for line in _tail(path, _LOG_TAIL_BYTES) if _ERROR.match(line)]
        if found:
            return f"{path.name}: {found[-1]}"
    return None


def _ask_queue(files: RunDir, job_id: str | None) -> tuple[bool, QueueEntry | None]:
    """Return whether squeue answered, and the entry of the run's job, if there is one.

    The job of a run that has not started is found by the path of its log.
    """
    options = ["--me", "--Format=JobID:|,State:|,STDOUT:|"]
    if job_id is not None:
        options = ["--format=%i|%T|%r", f"--jobs={job_id}"]
    try:
        answer = ask_queue(*options, timeout_s=_SQUEUE_S)
    except SlurmUnavailableError:
        return False, None
    if job_id is not None:
        fields = [line.split("|", 2) for line in answer if line.count("|") == 2]
        return True, QueueEntry(*fields[-1]) if fields else None
    logs = str(files.logs.resolve())
    for line in answer:
        number, state, log = [*line.split("|"), "", ""][:3]
        if log.startswith(f"{logs}/"):
            return True, QueueEntry(number, state)
    return True, None


def _tail(path: Path, nbytes: int) -> list[str]:
    """Return the complete lines in the last `nbytes` of a file."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            start = file.seek(max(0, end - nbytes))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = text.splitlines(keepends=True)[start > 0 :]
    return [line.rstrip() for line in lines if line.endswith("\n")]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
