"""One W&B session: a process that follows metrics.jsonl and hands each line to the W&B client.

Training neither waits for it nor shares a thread, a lock or a crash with it. It keeps what W&B has
in `wandb_state.json`, so what one session misses (no server, a killed process) is sent by a later
one from the same file.

    python -m zeta.tracking.wandb_worker MODE < INSTRUCTIONS     (by `zeta.tracking.wandb_sink`)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import wandb

from zeta import metric_names as names
from zeta.run.directory import RunDir
from zeta.run.jsonl import step_of_line
from zeta.tracking.wandb_alerts import Alert, Alerts
from zeta.tracking.wandb_sink import GRACE_S, NOT_STARTED, Order
from zeta.tracking.wandb_state import begin_state

_POLL_S = 0.25
_INIT_S = 20.0
"""Seconds that the server has to answer before another try."""
_FLUSH_S = 0.2
"""Seconds after which W&B's client writes to its own file what it was given."""
_BATCH = 100
"""Most rows handed over between two writes of the state."""
_PICTURES = "data/packs"
"""W&B's key of the pack pictures."""
_EXIT_CODES = {"finished": 0, "stopped": 85, "failed": 1}
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Slurm and terminals send these to all processes of a job; this one ends when training has."""


class Session:
    """One W&B session of a run."""

    def __init__(self, order: Order, mode: Literal["online", "offline"]) -> None:
        self.order, self.mode = order, mode
        self.files = RunDir(Path(order.init["dir"]))
        self.state = begin_state(self.files.wandb_state, self.files.metrics, self.files.wandb_files)
        self.alerts = Alerts(self.state.alerts)
        self.run: Any = None
        self.defined = set[str]()

    def follow(self) -> None:
        """Send everything until training has ended; then end the session.

        Raises:
            SystemExit: the client could not start.
            Exception: whatever the client raises when its own process has ended.
        """
        self._start()
        with self.files.metrics.open("rb") as metrics:
            while True:
                ending = read_ending(self.order)  # first: then all lines before it are in the file
                self._send_rows(metrics)
                self._send_pictures()
                if ending is not None:
                    self._finish(*ending)
                    return
                time.sleep(_POLL_S)

    def _start(self) -> None:
        order, state, online = self.order, self.state, self.mode == "online"
        state.session = order.pid
        state.write(self.files.wandb_state)  # NOTE: before W&B makes a folder: see `begin_state`
        try:
            # W&B ignores resume offline, with a warning; `zeta wandb-sync` joins the pieces.
            resume: Literal["allow"] | None = "allow" if online else None
            settings = _settings(order)
            self.run = wandb.init(**order.init, mode=self.mode, resume=resume, settings=settings)
        except Exception as error:  # logged, and tried again by a new process, as W&B requires
            state.trouble = (str(error).splitlines() or [type(error).__name__])[0]
            state.write(self.files.wandb_state)
            print(f"W&B could not start: {error}", file=sys.stderr)
            raise SystemExit(NOT_STARTED) from error
        if online:
            state.settle(self.run.summary.get(names.STEP) if self.run.resumed else None)
        # What a session leaves open that an offline one follows is lost to W&B rather than there
        # twice: only a server knows what it has.
        state.unsure_from = dict(state.logged) if online else None
        state.mode, state.trouble = self.mode, None
        state.page = self.run.url if online else state.page
        text = f"{order.init['name']} resumed at step {order.resumed_step}"
        restart = Alert("restart", "Run restarted", text, "INFO")
        alerts = self.alerts.of_event(restart) if order.resumed_step else []
        state.write(self.files.wandb_state)
        self.run.define_metric(names.STEP, hidden=True)
        self.run.define_metric("*", step_metric=names.STEP)
        self._alert(alerts)

    def _send_rows(self, metrics: IO[bytes]) -> None:
        rows = new_rows(metrics)
        while batch := list(islice(rows, _BATCH)):
            before = dict(self.state.logged)
            new = [values for row in batch if (values := self.state.take_new(row))]
            alerts = [
                alert
                for values in new
                for alert in self.alerts.of_row({"step": values[names.STEP], **values})
            ]
            if new:
                self.state.write(self.files.wandb_state)  # NOTE: before: see WandbState.logged
            for number, values in enumerate(new):
                try:
                    self._log(values)
                except Exception:  # the client is gone: the next one gets this row and the rest
                    self.state.logged = before
                    for sent in new[:number]:
                        self.state.note(sent)
                    self.state.write(self.files.wandb_state)
                    raise
            self._alert(alerts)

    def _log(self, values: Mapping[str, Any]) -> None:
        """Log a row, and have the summary of the run hold the best value of each score as well."""
        for name in values:
            if name not in self.defined:
                self.defined.add(name)
                if best := best_is(name):
                    self.run.define_metric(name, step_metric=names.STEP, summary=f"last,{best}")
        self.run.log(values)  # NOTE: never step=: W&B drops every step below its last.

    def _send_pictures(self) -> None:
        paths = sorted(self.files.wandb_pictures.glob("*.png"))
        if new := [path for path in paths if path.name not in self.state.pictures]:
            self.state.pictures += [path.name for path in new]
            self.state.write(self.files.wandb_state)
            self.run.log({_PICTURES: [wandb.Image(str(path), caption=path.stem) for path in new]})

    def _alert(self, alerts: list[Alert]) -> None:
        for alert in alerts:
            self.run.alert(alert.title, alert.text, level=alert.level)

    def _finish(self, outcome: str, why: str) -> None:
        if outcome == "failed":
            alert = Alert("failed", "Run failed", why or "it was killed", "ERROR")
            self._alert(self.alerts.of_event(alert))
        elif outcome == "stopped":
            self.run.mark_preempting()
        try:
            self.run.finish(exit_code=_EXIT_CODES[outcome])
        except TimeoutError:
            self.state.trouble = f"not all was uploaded within {self.order.finish_s:g} s"
        else:
            self.state.unsure_from = None
        self.state.write(self.files.wandb_state)


def best_is(name: str) -> str | None:
    """Return whether the `min` or the `max` of a metric is its best value; None: it has none."""
    group, _, score = name.partition("/")
    if group not in ("train", "val") or name in (names.VAL_IMAGES, names.VAL_REJECTED):
        return None
    if score.startswith("best_"):
        return None
    return "min" if "loss" in score.split("_") else "max"


def new_rows(metrics: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the objects of the complete lines that were appended since the last call."""
    while (line := metrics.readline()).endswith(b"\n"):
        if step_of_line(line) is not None:  # a line torn by a crash is left out
            yield json.loads(line)
    metrics.seek(-len(line), os.SEEK_CUR)  # the rest of it comes later


def read_order() -> Order:
    """Return the order, the first line of stdin."""
    return Order(**json.loads(_instructions()[0]))


def read_ending(order: Order) -> tuple[str, str] | None:
    """Return how and why training ended, the second line of stdin; None: it has not ended."""
    killed = os.getppid() != order.pid  # before the line, which may be written meanwhile
    lines = _instructions()
    if len(lines) > 1 and lines[1].endswith(b"\n"):
        outcome, why = json.loads(lines[1])
        return outcome, why
    return ("failed", "the training process was killed") if killed else None


def _instructions() -> list[bytes]:
    # NOTE: pread, because all workers of a run share the position in the file.
    return os.pread(0, os.fstat(0).st_size, 0).splitlines(keepends=True)


def _settings(order: Order) -> wandb.Settings:
    return wandb.Settings(
        console="off",
        silent=True,
        init_timeout=_INIT_S,
        finish_timeout=order.finish_s,
        finish_timeout_raises=True,
        x_stats_pid=order.pid,
        x_transaction_log_flush_interval=_FLUSH_S,
    )


def _end_after_training(order: Order) -> None:
    """End this process some time after that of training, which can then no longer do it."""
    while os.getppid() == order.pid:
        time.sleep(1)
    time.sleep(order.finish_s + GRACE_S)
    os._exit(1)


@contextlib.contextmanager
def _only_session(files: RunDir) -> Iterator[None]:
    """Wait for the session of a run that ended a moment ago, which may still be uploading."""
    files.wandb_files.mkdir(parents=True, exist_ok=True)
    with (files.wandb_files / ".lock").open("w") as lock:
        # A file system without locks: sessions follow each other there as well, by Slurm.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Send one session."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.environ.pop("WANDB_SERVICE", None)  # this process needs a client that no other can end
    order = read_order()
    threading.Thread(target=_end_after_training, args=(order,), daemon=True).start()
    session_mode: Literal["online", "offline"] = "online" if sys.argv[1] == "online" else "offline"
    with _only_session(RunDir(Path(order.init["dir"]))):
        Session(order, session_mode).follow()


if __name__ == "__main__":
    main()
