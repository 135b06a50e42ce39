"""Keeps a W&B session going while a process trains, and bounds how long its end may take.

A session that breaks (no server, a client that crashed) is tried again, later and later; nothing
is lost meanwhile, because sessions read metrics.jsonl. Where there is no server to the end, what
is left is recorded offline.

    python -m zeta.tracking.wandb_supervisor DESCRIPTOR        (started by zeta.tracking.wandb_sink)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from zeta.run.directory import RunDir
from zeta.tracking.wandb_control import NOT_STARTED, Control, Ending
from zeta.tracking.wandb_state import begin_state, has_news

GRACE_S = 5.0
"""By how much longer than asked for the end of an online session may take."""
OFFLINE_S = 60.0
"""Longest that recording offline what is left may take."""
_POLL_S = 0.1
_FIRST_RETRY_S = 5.0
_LONGEST_RETRY_S = 600.0
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Slurm and terminals send these to all processes of a job; ours end when training has."""


class Supervisor:
    """Runs sessions until one has ended in order, or training has ended and time is up."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self.order = control.order
        self._ended_at: float | None = None
        """By the monotonic clock; None: training goes on."""

    def supervise(self) -> None:
        """Run sessions."""
        retry_s, once_more = _FIRST_RETRY_S, True
        limit_s = self.order.finish_s + GRACE_S
        while (code := self._session(self.order.mode, limit_s)) != 0:
            if code != NOT_STARTED and once_more:
                # Slurm's SIGTERM to all processes of a job ends the client's own process as well:
                # what happens until the job ends is recorded all the same.
                once_more = False
                continue
            if self._wait(retry_s):
                if self._something_is_left():
                    self._session("offline", time.monotonic() - self._end() + OFFLINE_S)
                return
            retry_s = min(2 * retry_s, _LONGEST_RETRY_S)

    def _session(self, mode: str, limit_s: float) -> int:
        """Run one session, for at most so long after the end; return 0 if it ended in order."""
        descriptor = self.control.descriptor
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "zeta.tracking.wandb_worker", str(descriptor), mode],
            stdin=subprocess.DEVNULL,
            pass_fds=[descriptor],
        )
        while worker.poll() is None:
            if self._training_ended() and time.monotonic() - self._end() > limit_s:
                worker.kill()
            time.sleep(_POLL_S)
        return worker.returncode

    def _wait(self, seconds: float) -> bool:
        """Wait before the next try; return whether training has ended meanwhile, or before."""
        until = time.monotonic() + seconds
        while not self._training_ended() and time.monotonic() < until:
            time.sleep(_POLL_S)
        return self._training_ended()

    def _training_ended(self) -> bool:
        if self._ended_at is not None:
            return True
        if os.getppid() != self.order.pid:
            self.control.end(Ending("failed", "the training process was killed"))
        if self.control.ending is None:
            return False
        self._ended_at = time.monotonic()
        return True

    def _end(self) -> float:
        assert self._ended_at is not None
        return self._ended_at

    def _something_is_left(self) -> bool:
        files = RunDir(Path(self.order.run_dir))
        state = begin_state(files.wandb_state, files.metrics, files.wandb_files)
        return has_news(state, files.metrics)


def main() -> None:
    """Supervise the sessions of one process that trains."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)  # what it starts inherits that
    Supervisor(Control(int(sys.argv[1]))).supervise()


if __name__ == "__main__":
    main()
