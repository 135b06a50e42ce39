"""Recognise a path into a run that was given where an export is expected, for error messages."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from zeta.run.directory import TRAINER_STATE, RunDir, step_name, step_of


@dataclass(frozen=True)
class RunPlace:
    """A run directory, or a folder in it."""

    run: Path
    """The run directory."""
    what: str
    """Description of the path, for messages."""
    step: int | None = None
    """Checkpoint step; None if the path is not a checkpoint."""

    @property
    def export_command(self) -> str:
        """The command that exports it."""
        step = "" if self.step is None else f" --step {self.step}"
        return f"zeta export {shlex.quote(str(self.run))} OUT{step}"


def find_run(path: Path) -> RunPlace | None:
    """Return the run to which a path belongs, or None.

    The path may be a run directory, its folder of checkpoints, or a checkpoint.

    Raises:
        OSError: the folder cannot be read.
    """
    if not path.is_dir():
        return None
    if (path / TRAINER_STATE).is_file():
        step = _step(path)
        run = _above(_above(path))
        if step is None or not RunDir(run).config.is_file():
            return None
        return RunPlace(run, "a checkpoint of a run", step)
    files = RunDir(path)
    if files.config.is_file() and (files.checkpoints.is_dir() or files.metrics.is_file()):
        return RunPlace(path, "the directory of a run")
    run = _above(path)
    if RunDir(run).config.is_file() and path.resolve() == RunDir(run).checkpoints.resolve():
        return RunPlace(run, "the folder of the checkpoints of a run")
    return None


def _step(path: Path) -> int | None:
    name = path.resolve().name
    digits = name.removeprefix("step_")
    return step_of(name) if digits.isdecimal() and name == step_name(int(digits)) else None


def _above(path: Path) -> Path:
    """Return the parent folder of a path, written as the user wrote it if possible."""
    return path.parent if path.name not in ("", "..") else path.resolve().parent
