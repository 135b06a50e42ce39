"""Weights & Biases: one run for the life of a run directory, however often it is requeued.

The W&B client runs in a process of its own (`zeta.tracking.wandb_worker`), which follows
metrics.jsonl. This module is the side of training: it starts that process, starts it again if it
breaks, and waits for it at the end, but not long.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from zeta.run.directory import RunDir
from zeta.tracking.config import WandbConfig
from zeta.tracking.wandb_mode import WandbMode, resolve_mode
from zeta.tracking.wandb_state import WandbState, has_news, read_state

NOT_STARTED = 3
"""Exit status of a worker whose W&B client could not start, mostly for want of a server."""
GRACE_S = 5.0
"""Seconds by which the end of an online session may exceed `tracker.wandb.finish_s`."""
_OFFLINE_S = 60.0
"""Longest that it may take to record offline what W&B did not get."""
_POLL_S = 0.05
_LONG_S = 3.0
"""Seconds of waiting at the end after which the user is notified."""
_FIRST_RETRY_S, _LONGEST_RETRY_S = 5.0, 600.0


@dataclass(frozen=True)
class Order:
    """Instructions for the worker."""

    init: dict[str, Any]
    """Arguments of `wandb.init`."""
    finish_s: float
    """Longest that the end of the session may take."""
    resumed_step: int
    """Committed steps of the checkpoint that training resumed from."""
    pid: int
    """The process that trains: W&B measures it, and the session ends when it does."""


class Worker:
    """The process that sends metrics.jsonl to W&B.

    Its stdin is a file without a name, which unlike a pipe never fills up. The first line is the
    order; the second follows once training has ended, and holds how and why.
    """

    def __init__(self, order: Order) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        with tempfile.TemporaryFile() as file:
            self._descriptor = os.dup(file.fileno())
        self._append(asdict(order))

    @property
    def status(self) -> int | None:
        """Exit status; None: the process is running."""
        return NOT_STARTED if self._process is None else self._process.poll()

    def start(self, mode: WandbMode) -> None:
        """Start a process, online or offline."""
        self._process = None
        # -P: a wandb.py in the folder that training was started from must not stand in for W&B.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "zeta.tracking.wandb_worker", mode],
            stdin=self._descriptor,
            stdout=subprocess.DEVNULL,  # whoever reads that of training need not wait for this one
            start_new_session=True,  # Ctrl-C and the end of the ranks must not end it
        )

    def end(self, outcome: str, why: str = "") -> None:
        """Notify the process that training has ended: see `WandbSink.close`."""
        self._append([outcome, why])

    def kill(self) -> None:
        """End the process, unless it has ended."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End the process, and the file with it."""
        self.kill()
        os.close(self._descriptor)

    def _append(self, record: object) -> None:
        # NOTE: pwrite leaves the file's position alone, which the process shares.
        line = (json.dumps(record) + "\n").encode()
        os.pwrite(self._descriptor, line, os.fstat(self._descriptor).st_size)


def worker_order(
    config: WandbConfig,
    *,
    name: str,
    run_dir: RunDir,
    run_id: str,
    run_config: Mapping[str, Any],
    resumed_step: int = 0,
) -> Order:
    """Return the order for a worker of this process; the arguments are those of `WandbSink`."""
    filed = ("entity", "project", "group", "job_type", "tags")
    init = {key: getattr(config, key) for key in filed}
    init |= {"name": name, "id": run_id, "dir": str(run_dir.path.absolute())}
    return Order(init | {"config": dict(run_config)}, config.finish_s, resumed_step, os.getpid())


class WandbSink:
    """Sends metrics.jsonl to one W&B run. Failures of W&B are logged and never stop training."""

    def __init__(
        self,
        config: WandbConfig,
        *,
        name: str,
        run_dir: RunDir,
        run_id: str,
        run_config: Mapping[str, Any],
        resumed_step: int = 0,
        notify: Callable[[str], None] = print,
    ) -> None:
        """Start to send what metrics.jsonl holds and will hold.

        Args:
            config: mode, project and how the run is filed.
            name: display name of the run.
            run_dir: directory of metrics.jsonl, and of W&B's local files (`wandb/`).
            run_id: id of the run, the same after each restart; see `stable_run_id`.
            run_config: shown in W&B.
            resumed_step: committed steps of the checkpoint that training resumed from.
            notify: called with messages for the user.
        """
        self._run_dir, self._notify = run_dir, notify
        self._limit_s = config.finish_s + GRACE_S
        self._notified: set[str] = set()
        self._worker: Worker | None = None
        self._retry_s, self._retry_at = _FIRST_RETRY_S, 0.0
        self.mode: WandbMode = resolve_mode(config.mode, os.environ)
        if self.mode == "disabled":
            return
        if config.mode == "online" and self.mode == "offline":
            notify(
                "W&B: tracker.wandb.mode is online, but no API key was found, so the run is "
                "recorded offline; set WANDB_API_KEY, or type `wandb login`"
            )
        order = worker_order(
            config,
            name=name,
            run_dir=run_dir,
            run_id=run_id,
            run_config=run_config,
            resumed_step=resumed_step,
        )
        with self._tolerance():
            self._worker = Worker(order)
            self._start(self.mode)

    def poll(self) -> None:
        """Start the worker again if it broke, and log where the run is shown, or why it is not."""
        if self._worker is None:
            return
        if self._worker.status is not None and time.monotonic() >= self._retry_at:
            self._start(self.mode)
        self._report()

    def close(self, outcome: str, why: str = "") -> None:
        """End the session: wait a while for what is on its way, and log how to send the rest.

        Args:
            outcome: finished; stopped, where it was asked to and can be resumed; or failed.
            why: error message of a run that failed.
        """
        if self._worker is None:
            return
        with self._tolerance():
            self._worker.end(outcome, why)
        status = self._wait(self._limit_s)
        if status not in (0, NOT_STARTED):
            # Slurm's SIGTERM to all processes of a job ends the client's own process as well:
            # what happens until the job ends is recorded all the same.
            self._start(self.mode)
            status = self._wait(self._limit_s)
        if status != 0 and self._is_incomplete():
            self._start("offline")
            self._wait(_OFFLINE_S)
        self._worker.close()
        self._worker = None
        self._report()
        if hint := rest_hint(self._run_dir, self._state()):
            self._notify(hint)

    def _is_incomplete(self) -> bool:
        """Return whether W&B lacks something of the run, or nobody can tell."""
        state = self._state()
        try:
            return state is None or has_news(state, self._run_dir.metrics)
        except OSError:  # the metrics cannot be read for the moment, which must not end training
            return True

    def _start(self, mode: WandbMode) -> None:
        """Start the worker, and set how long to wait before it may be started again."""
        assert self._worker is not None
        self._retry_at = time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, _LONGEST_RETRY_S)
        with self._tolerance():
            self._worker.start(mode)

    def _wait(self, seconds: float) -> int:
        """Wait for the worker to end, and kill it if it does not; return its exit status."""
        assert self._worker is not None
        began = time.monotonic()
        while (status := self._worker.status) is None:
            if (waited := time.monotonic() - began) > seconds:
                break
            if waited > _LONG_S:
                self._notify_once("W&B: waiting for the last metrics to be sent")
            time.sleep(_POLL_S)
        self._worker.kill()
        return NOT_STARTED if status is None else status

    @contextmanager
    def _tolerance(self) -> Iterator[None]:
        """Log a full disk or a full table of processes, which must not end training."""
        try:
            yield
        except OSError as error:
            self._notify_once(f"W&B: its process could not be started or notified ({error})")

    def _report(self) -> None:
        if (state := self._state()) is None:
            return
        if state.trouble is not None and state.mode != "offline":
            self._notify_once(
                f"W&B cannot be reached ({state.trouble}); training continues, and what W&B "
                "misses is sent later"
            )
        elif state.mode == "online" and state.page is not None:
            self._notify_once(f"W&B: {state.page}")

    def _notify_once(self, text: str) -> None:
        if text not in self._notified:
            self._notified.add(text)
            self._notify(text)

    def _state(self) -> WandbState | None:
        """Return what the worker of this process has noted; None: nothing yet."""
        try:
            state = read_state(self._run_dir.wandb_state)
            return state if state is not None and state.session == os.getpid() else None
        except (ValueError, OSError) as error:
            self._notify_once(f"W&B: {error}")
            return None


def rest_hint(run_dir: RunDir, state: WandbState | None) -> str | None:
    """Return how to send what W&B lacks of a run that has ended; None: it lacks nothing."""
    command = f"`zeta wandb-sync {shlex.quote(str(run_dir.path))}`"
    if state is None or state.mode is None:
        return f"W&B: nothing was recorded of this part of the run; {command} sends it"
    if state.trouble is not None or state.unsure_from is not None:
        trouble = "" if state.trouble is None else f" ({state.trouble})"
        return f"W&B does not have all of the run{trouble}; {command} sends the rest"
    if state.mode == "offline":
        return f"W&B: recorded offline; {command} uploads it"
    return None
