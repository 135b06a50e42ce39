"""What a person asks of a run by `touch RUN_DIR/SAVE_NOW` or `touch RUN_DIR/STOP`."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from zeta.exit_codes import ExitCode
from zeta.run.directory import RunDir

_LOOK_S = 1.0


class RequestFiles:
    """A look at the requests, at most once a second however often it is asked; rank 0 takes it.

    SAVE_NOW is deleted once the checkpoint is written. STOP stays: while it is there no start of
    the run trains, so that neither a requeue nor the next job of a chain goes on.
    """

    def __init__(self, run_dir: RunDir | None, *, look_s: float = _LOOK_S) -> None:
        """Look into `run_dir` (None: into none), not more often than every `look_s` seconds."""
        self._run_dir, self._look_s = run_dir, look_s
        self._looked_at = float("-inf")
        self._save_asked: int | None = None
        self._taken: int | None = None
        """Time of change, in ns, of a SAVE_NOW that is seen and of the last one that was taken."""
        self._stop_asked = False

    def save_asked(self) -> bool:
        """Whether a checkpoint is asked for."""
        self._look()
        return self._save_asked is not None

    def stop_asked(self) -> ExitCode | None:
        """Return what to exit with if the run is asked to save and end; None: go on."""
        self._look()
        return ExitCode.INTERRUPTED if self._stop_asked else None

    def taken(self) -> None:
        """A checkpoint is begun, which is what was asked for until now."""
        if self._save_asked is not None:
            self._taken, self._save_asked = self._save_asked, None

    def saved(self) -> None:
        """Delete the SAVE_NOW that was taken, unless it was touched again: it has been done."""
        if self._run_dir is not None and self._taken is not None:
            path = self._run_dir.save_request
            # Where it cannot be deleted, or NFS shows it for a while, it stays taken.
            with contextlib.suppress(OSError):
                if _changed(path) == self._taken:
                    path.unlink()

    def _look(self) -> None:
        now = time.monotonic()
        if self._run_dir is None or now - self._looked_at < self._look_s:
            return
        self._looked_at = now
        changed = _changed(self._run_dir.save_request)
        if changed != self._taken:
            self._save_asked = changed
        # Once seen it holds, even if it is deleted before all ranks have agreed on it.
        self._stop_asked = self._stop_asked or _changed(self._run_dir.stop_request) is not None


def _changed(path: Path) -> int | None:
    """Return when a file was changed; None: it is not there, or storage fails for a moment."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
