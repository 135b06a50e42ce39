"""Requests that a person makes of a run with `touch RUN_DIR/SAVE_NOW` or `touch RUN_DIR/STOP`."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from zeta.exit_codes import ExitCode
from zeta.run.directory import RunDir

_LOOK_S = 1.0


class RequestFiles:
    """The request files of a run, read by rank 0, at most once a second.

    SAVE_NOW is deleted once the checkpoint is written. STOP stays: while it exists no start of the
    run trains, so that neither a requeue nor the next job of a chain continues the run.
    """

    def __init__(self, run_dir: RunDir | None, *, look_s: float = _LOOK_S) -> None:
        """Read the files of `run_dir` (None: no files), at most every `look_s` seconds."""
        self._run_dir, self._look_s = run_dir, look_s
        self._looked_at = float("-inf")
        self._save_asked: int | None = None
        self._taken: int | None = None
        """Modification times, in ns, of a waiting SAVE_NOW and of the one served last."""
        self._stop_asked = False

    def save_asked(self) -> bool:
        """Return whether a checkpoint is requested."""
        self._look()
        return self._save_asked is not None

    def stop_asked(self) -> ExitCode | None:
        """Return the exit code if the run is asked to save and end; None: continue."""
        self._look()
        return ExitCode.INTERRUPTED if self._stop_asked else None

    def taken(self) -> None:
        """Mark the request as served by the checkpoint that begins now."""
        if self._save_asked is not None:
            self._taken, self._save_asked = self._save_asked, None

    def saved(self) -> None:
        """Delete the SAVE_NOW that was served, unless it was touched again since."""
        if self._run_dir is not None and self._taken is not None:
            path = self._run_dir.save_request
            # If it cannot be deleted, or NFS still lists it for a while, it stays served.
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
        # A STOP once seen stays valid, even if it is deleted before all ranks agree on it.
        self._stop_asked = self._stop_asked or _changed(self._run_dir.stop_request) is not None


def _changed(path: Path) -> int | None:
    """Return the modification time of a file in ns; None if it is missing or unreadable now."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
