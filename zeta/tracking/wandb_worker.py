"""One W&B session: a process that follows metrics.jsonl and hands each line to the W&B client.

Training neither waits for it nor shares a thread, a lock or a crash with it. It keeps what W&B has
in `wandb_state.json`, so what one session misses (the server was away, the process was killed)
comes with a later one, from the same file.

    python -m zeta.tracking.wandb_worker DESCRIPTOR MODE   (by `wandb_supervisor`)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import wandb

from zeta import metric_names as names
from zeta.run.directory import RunDir
from zeta.tracking.wandb_alerts import Alert, Alerts
from zeta.tracking.wandb_control import NOT_STARTED, Control, Ending, Order
from zeta.tracking.wandb_state import begin_state

POLL_S = 0.25
INIT_S = 20.0
"""Seconds that the server has to answer before another try."""
_FLUSH_S = 0.2
"""Seconds after which W&B's client writes to its own file what it was given."""
_BATCH = 100
"""Rows between two notes of what was handed over: many when a whole run is sent at once."""
PICTURES = "data/packs"
"""W&B's key of the pack pictures."""
_EXIT_CODES = {"finished": 0, "stopped": 85, "failed": 1}


class Lines:
    """Yields the whole lines that were appended to a JSON-lines file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._rest = b""

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield the objects with a step; a line torn by a crash is left out."""
        if self._file is None:
            if not self._path.exists():
                return
            self._file = self._path.open("rb")
        for line in self._file:
            self._rest += line
            if not self._rest.endswith(b"\n"):
                return  # the rest of it comes later
            text, self._rest = self._rest, b""
            with contextlib.suppress(ValueError):
                row = json.loads(text)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    yield row


class Session:
    """One W&B session of a run."""

    def __init__(self, control: Control, mode: Literal["online", "offline"]) -> None:
        self.control, self.mode = control, mode
        self.order: Order = control.order
        self.files = RunDir(Path(self.order.run_dir))
        self.state = begin_state(self.files.wandb_state, self.files.metrics, self.files.wandb_files)
        self.alerts = Alerts(self.state.alerts)
        self.lines = Lines(self.files.metrics)
        self.run: Any = None
        self.defined = set[str]()

    def follow(self) -> None:
        """Send everything until training has ended; then end the session.

        Raises:
            SystemExit: the client could not start.
            Exception: whatever the client raises when its own process has ended.
        """
        self._start()
        while True:
            ending = self.control.ending  # before the lines: all that were written before it are in
            self._send_lines()
            self._send_pictures()
            if ending is not None:
                self._finish(ending)
                return
            time.sleep(POLL_S)

    def _start(self) -> None:
        order, state = self.order, self.state
        state.session = order.pid
        state.write(self.files.wandb_state)  # NOTE: before W&B makes a folder: see `begin_state`
        online = self.mode == "online"
        try:
            self.run = wandb.init(
                entity=order.entity,
                project=order.project,
                group=order.group,
                job_type=order.job_type,
                tags=order.tags or None,
                name=order.name,
                id=order.run_id,
                # W&B ignores resume offline, with a warning; `zeta wandb-sync` stitches.
                resume="allow" if online else None,
                mode=self.mode,
                dir=str(self.files.path),
                config=order.config,
                settings=_settings(order),
            )
        except Exception as error:  # told, and tried again: by a new process, as W&B asks for it
            state.trouble = (str(error).splitlines() or [type(error).__name__])[0]
            state.write(self.files.wandb_state)
            print(f"W&B could not start: {error}", file=sys.stderr)
            raise SystemExit(NOT_STARTED) from error
        if online:
            state.settle(self.run.summary.get(names.STEP) if self.run.resumed else None)
        # What a session leaves open that an offline one follows is lost to W&B rather than there
        # twice: only a server could tell what it has.
        state.unsure_from = dict(state.logged) if online else None
        state.mode, state.trouble = self.mode, None
        state.page = self.run.url if online else state.page
        state.write(self.files.wandb_state)
        self.run.define_metric(names.STEP, hidden=True)
        self.run.define_metric("*", step_metric=names.STEP)
        if order.resumed_step:
            text = f"{order.name} goes on from step {order.resumed_step}"
            self._alert(self.alerts.of_event(Alert("restart", "Run restarted", text, "INFO")))

    def _send_lines(self) -> None:
        lines = self.lines.new()
        while rows := list(islice(lines, _BATCH)):
            before, new = [], []
            for row in rows:
                marks = dict(self.state.logged)
                if values := self.state.take_new(row):
                    before.append(marks)
                    new.append(values)
            if not new:
                continue
            found = [alert for values in new for alert in self.alerts.of_row(_row(values))]
            self.state.write(self.files.wandb_state)  # NOTE: before: see WandbState.logged
            for values, marks in zip(new, before, strict=True):
                try:
                    self._define_best(values)
                    # Never step=: W&B drops every step below its last.
                    self.run.log(values)
                except Exception:  # the client is gone: the next one gets this row and the rest
                    self.state.logged = marks
                    self.state.write(self.files.wandb_state)
                    raise
            self._alert(found)

    def _define_best(self, metrics: Iterable[str]) -> None:
        """Have the summary of the run hold the best value of each score, besides the last."""
        for name in metrics:
            if name not in self.defined:
                self.defined.add(name)
                if best := best_is(name):
                    self.run.define_metric(name, step_metric=names.STEP, summary=f"last,{best}")

    def _send_pictures(self) -> None:
        folder = self.files.wandb_pictures
        paths = sorted(folder.glob("*.png")) if folder.is_dir() else []
        new = [path for path in paths if path.name not in self.state.pictures]
        if new:
            self.state.pictures += [path.name for path in new]
            self.state.write(self.files.wandb_state)
            self.run.log({PICTURES: [wandb.Image(str(path), caption=path.stem) for path in new]})

    def _alert(self, alerts: list[Alert]) -> None:
        for alert in alerts:
            self.run.alert(alert.title, alert.text, level=alert.level)
        if alerts:
            self.state.write(self.files.wandb_state)

    def _finish(self, ending: Ending) -> None:
        if ending.outcome == "failed":
            alert = Alert("failed", "Run failed", ending.why or "it was killed", "ERROR")
            self._alert(self.alerts.of_event(alert))
        elif ending.outcome == "stopped":
            self.run.mark_preempting()
        try:
            self.run.finish(exit_code=_EXIT_CODES[ending.outcome])
        except TimeoutError:
            self.state.trouble = f"not all was uploaded within {self.order.finish_s:g} s"
        else:
            self.state.unsure_from = None
        self.state.write(self.files.wandb_state)


def best_is(name: str) -> str | None:
    """Return what the best value of a metric is, `min` or `max`; None: it has none."""
    group, _, score = name.partition("/")
    if group not in ("train", "val") or name in (names.VAL_IMAGES, names.VAL_REJECTED):
        return None
    if score.startswith("best_"):
        return None
    return "min" if score.startswith("loss") else "max"


def _row(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": values[names.STEP], **values}


def _settings(order: Order) -> wandb.Settings:
    return wandb.Settings(
        console="off",
        silent=True,
        init_timeout=INIT_S,
        finish_timeout=order.finish_s,
        finish_timeout_raises=True,
        x_stats_pid=order.pid,
        x_transaction_log_flush_interval=_FLUSH_S,
    )


@contextlib.contextmanager
def sole_session(files: RunDir) -> Iterator[None]:
    """Wait for the session of a run that ended a moment ago, which may still be uploading."""
    files.wandb_files.mkdir(parents=True, exist_ok=True)
    with (files.wandb_files / ".lock").open("w") as lock:
        # A file system without locks: sessions follow each other there as well, by Slurm.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Send one session."""
    control = Control(int(sys.argv[1]))
    os.environ.pop("WANDB_SERVICE", None)  # a client of its own: nobody else can end it
    with sole_session(RunDir(Path(control.order.run_dir))):
        Session(control, "online" if sys.argv[2] == "online" else "offline").follow()


if __name__ == "__main__":
    main()
