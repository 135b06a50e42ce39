"""The hang watchdog: it writes the current phase of a rank to disk and ends a rank that hangs.

A thread writes `heartbeat/rank_XXXXX.json` every few seconds and checks the clock. Once the current
phase exceeds its limit, it writes the stacks of all threads (and of forked loader workers) to the
rank's log and ends the process as a crash. The other ranks do the same, because their own phase
lasts as long while they wait. The main thread is not needed: it may be stuck in a collective or a
kernel. The thread does need Python's global lock, though. If the main thread hangs while it has
that lock, the alarm of `faulthandler` (a C thread, reset at every check) ends the process instead.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from zeta.config_field import check_range, free
from zeta.distributed import set_collective_timeout
from zeta.files import write_whole_text
from zeta.run.console import log_line
from zeta.run.heartbeat import Heartbeat

CRASH = 1
_LONGEST_LIMIT_S = 1e8
"""Largest limit: three years. The operating system's alarms overflow a little beyond that."""
_LOOK_S = 1.0
_GRACE_S = 5.0
"""Delay of the alarm after the thread's deadline: time to check the clock and write stacks."""
_PEERS_GRACE_S = 60.0
"""Extra time of a collective beyond its phase, so that each rank's watchdog reports first."""


@dataclass
class WatchdogConfig:
    """Time limits of the phases, in seconds; a rank beyond them is taken to hang. 0: no limit."""

    start_s: float = free(1800.0)
    """Limit from the start of a rank to the end of its first step."""
    data_s: float = free(900.0)
    """Limit on waiting for the packs of a step."""
    train_s: float = free(900.0)
    """Limit on a step, including the wait for the other ranks and their data: at least `data_s`."""
    save_s: float = free(1800.0)
    """Limit on the wait for a checkpoint: copying it, and publishing it once it is written."""
    evaluate_s: float = free(1800.0)
    """Limit on one part of an evaluation."""
    heartbeat_s: float = free(5.0)
    """Seconds between two heartbeats on disk."""

    def __post_init__(self) -> None:
        for name in ("start_s", "data_s", "train_s", "save_s", "evaluate_s"):
            check_range(f"train.watchdog.{name}", getattr(self, name), 0, _LONGEST_LIMIT_S)
        check_range("train.watchdog.heartbeat_s", self.heartbeat_s, 0.1, 3600)
        if self.limit("train") < self.limit("data"):
            limit = f"{self.data_s:g}" if self.data_s else "0 (no limit)"
            raise ValueError(
                f"train.watchdog.train_s is {self.train_s:g}, below train.watchdog.data_s = "
                f"{limit}: a rank waits for the data of the others within its step, so "
                f"{'raise train_s' if self.data_s else 'set train_s to 0 as well'}"
            )

    def limit(self, phase: str) -> float:
        """Return the seconds that a phase may last; infinity where there is no limit."""
        seconds = float(getattr(self, f"{phase}_s"))
        return seconds or float("inf")


class PhaseWatch(Protocol):
    """The interface by which the trainer reports its current phase."""

    def enter(self, phase: str, step: int) -> None:
        """Enter a phase (start, data, train, save, evaluate); its time counts from zero.

        Args:
            phase: name of the phase.
            step: committed steps.
        """
        ...


class Unwatched:
    """A `PhaseWatch` that does nothing."""

    def enter(self, phase: str, step: int) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class _Now:
    """The current phase; replaced as a whole, so that the thread always sees one state."""

    phase: str
    step: int
    limit: float
    since: float = field(default_factory=time.monotonic)


class Watchdog:
    """Watches this process from its creation, in phase `start`, until `close`."""

    def __init__(
        self, path: Path, rank: int, limits: WatchdogConfig, report: Callable[[str], None]
    ) -> None:
        """Start watching.

        Args:
            path: heartbeat file of this rank.
            rank: this rank.
            limits: time limits of the phases.
            report: called with the reason just before the process ends.
        """
        self._path, self._rank, self._limits, self._report = path, rank, limits, report
        self._host = socket.gethostname()
        self._log = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding="utf-8")
        self._steady = max(limits.limit("data"), limits.limit("train"))
        self._first_step: int | None = None
        self._collective_limit = 0.0
        self._now = _Now("start", 0, limits.limit("start"))
        self._stop = threading.Event()
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Crashes in C code leave their stacks as well, and forked workers inherit this.
        faulthandler.enable(self._log)
        self._set_alarm()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int) -> None:
        """Enter a phase, see `PhaseWatch`. Cheap enough for every step: it sets one variable."""
        if self._first_step is None and phase != "start":
            self._first_step = step
        limit = self._limits.limit(phase)
        # The first step compiles and sets up communication: it is part of the start.
        starting = step == self._first_step and phase in ("data", "train")
        if starting:
            limit = max(limit, self._limits.limit("start"))
        self._now = _Now(phase, step, limit)
        widest = max(limit, self._steady)
        if limit > self._steady:
            self._set_alarm()
        if widest != self._collective_limit:
            set_collective_timeout(widest + _PEERS_GRACE_S)
            self._collective_limit = widest

    def close(self) -> None:
        """Stop watching, and write a last heartbeat with the phase `ended`."""
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
        self._now = _Now("ended", self._now.step, float("inf"))
        self._write()
        with suppress(OSError):  # a full disk
            self._log.close()

    def _watch(self) -> None:
        written = float("-inf")
        while not self._stop.is_set():
            now, at = self._now, time.monotonic()
            if at - now.since > now.limit:
                self._end(now)
            if at - written >= self._limits.heartbeat_s:
                self._write()
                written = at
            self._set_alarm()
            self._stop.wait(_LOOK_S)

    def _set_alarm(self) -> None:
        """Set faulthandler's alarm after all deadlines that may pass while this thread is stuck."""
        now = self._now
        left = max(now.since + now.limit - time.monotonic(), self._steady) + _GRACE_S
        with self._lock:
            faulthandler.cancel_dump_traceback_later()
            if left != float("inf"):
                faulthandler.dump_traceback_later(left, exit=True, file=self._log)

    def _write(self) -> None:
        now = self._now
        limit = None if now.limit == float("inf") else now.limit
        seconds = round(time.monotonic() - now.since, 3)
        beat = Heartbeat(
            now.phase, now.step, seconds, limit, time.time(), self._rank, self._host, os.getpid()
        )
        try:
            # A heartbeat is outdated in seconds: do not wait for the disk.
            write_whole_text(self._path, json.dumps(asdict(beat)) + "\n", durable=False)
        except OSError as error:  # a full disk: run and watchdog continue
            log_line(f"the heartbeat could not be written: {error}", self._log)

    def _end(self, now: _Now) -> None:
        """Write all stacks and end this process."""
        log_line(f"\nhang in phase {now.phase} of step {now.step}: all stacks", self._log)
        faulthandler.dump_traceback(self._log, all_threads=True)
        self._write()
        self._report(
            f"phase {now.phase} of step {now.step} has lasted more than {now.limit:g} s on "
            f"{self._host} (train.watchdog.{now.phase}_s), so the rank is taken to hang"
        )
        for worker in multiprocessing.active_children():
            if worker.pid is not None:
                os.kill(worker.pid, signal.SIGABRT)  # its faulthandler writes to the same log
        os._exit(CRASH)
