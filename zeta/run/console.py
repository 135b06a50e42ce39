"""The terminal and the rank's log: only rank 0 writes to the terminal, the rest goes to the log.

File descriptors 1 and 2 of the process are redirected, not `sys.stdout`, so that the output of C
libraries and child processes reaches `logs/rank_XXXXX.log` as well.
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from tqdm import tqdm

from zeta import metric_names as names

_SHOWN = (
    ("loss", names.TRAIN_LOSS, "{:.4f}"),
    ("lr", names.LEARNING_RATE, "{:.2e}"),
    ("img/s", names.IMAGES_PER_S, "{:.1f}"),
    ("tok/s", names.TOKENS_PER_S, "{:.0f}"),
    ("fill", names.FILL, "{:.1%}"),
)
_UNKNOWN_COLUMNS = 120
"""Assumed width of a pseudo-terminal that reports no size."""
_BAR_COLUMNS = 42
"""Columns of the shortest bar with its times and its rate, without the step counts."""
_REFRESH_S = 0.2
"""Seconds between two updates of an evaluation's progress."""


def log_line(text: str, stream: IO[str], end: str = "\n") -> None:
    """Write a line to a log; on a full disk the line is late or lost, and the run continues."""
    with suppress(OSError):
        print(text, file=stream, end=end, flush=True)


class Console:
    """The terminal output and the log of one rank."""

    def __init__(self, log_path: Path, rank: int) -> None:
        """Send this process's output to `log_path` (appended), keeping the terminal aside."""
        log_path.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        self.rank = rank
        self._saved = (os.dup(1), os.dup(2))
        self.terminal: IO[str] = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        self._bar: tqdm[None] | None = None
        self._total: int | None = None
        self._silent_steps = 0
        """Steps without a line, to be announced with the first step; 0: nothing to announce."""
        self._started: tuple[float, float | None] = (0.0, None)
        self._share: float | None = None
        self._said_fatal = False
        self._shown_at = 0.0
        self._postfix = ""
        """Text beside the bar while no evaluation is running."""

    def start(
        self, first_step: int, max_steps: int | None, share: float | None, log_every: int
    ) -> None:
        """Begin to show progress.

        Args:
            first_step: committed steps so far.
            max_steps: number of steps at which the run ends; None: unknown.
            share: completed share of the run, in [0, 1]; None: unknown.
            log_every: steps from one line of metrics to the next.
        """
        self._total, self._silent_steps = max_steps, log_every
        self._share = share
        self._started = (time.monotonic(), share)
        something_left = max_steps is None or first_step < max_steps
        if self.rank == 0 and self.terminal.isatty() and something_left:
            sized = self._columns() is not None
            self._bar = tqdm(
                total=max_steps,
                initial=first_step,
                file=self.terminal,
                unit="step",
                dynamic_ncols=sized,
                ncols=None if sized else _UNKNOWN_COLUMNS,
            )

    def step(self, step: int, share: float | None) -> None:
        """Move the bar to `step` committed steps; `share` of the run is complete, in [0, 1].

        Without a bar, the first step is told, since lines of metrics may be minutes apart.
        """
        self._share = share
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        elif self.rank == 0 and self._silent_steps > 1:
            seconds = time.monotonic() - self._started[0]
            every = f"a line follows every {self._silent_steps:,} steps"
            self._print(f"{self._step(step)}  the first one, took {seconds:.1f} s; {every}")
        self._silent_steps = 0

    def metrics(self, step: int, values: Mapping[str, float | str]) -> None:
        """Show the metrics of a log interval: beside the bar, or as one aligned line."""
        if self.rank != 0:
            return
        eta = self._eta()
        shown = [(key, form.format(values[name])) for key, name, form in _SHOWN if name in values]
        if self._bar is not None:
            # Without a number of steps to reach, the bar cannot estimate the end itself.
            first = [f"eta {eta}"] if self._total is None and eta != "-" else []
            self._postfix = self._fitting([*first, *(f"{key} {text}" for key, text in shown)])
            self._bar.set_postfix_str(self._postfix)
            return
        columns = "  ".join(f"{key} {text:>9}" for key, text in shown)
        self._print(f"{self._step(step)}  eta {eta:>8}  {columns}")

    def evaluating(self, done: int, images: int) -> None:
        """Show the progress of an evaluation beside the bar: `done` of `images`.

        It replaces the metrics: both together are wider than a terminal.
        """
        if self._bar is not None and time.monotonic() - self._shown_at > _REFRESH_S:
            self._shown_at = time.monotonic()
            self._bar.set_postfix_str(f"evaluating {done / max(images, 1):4.0%}")

    def evaluation(
        self, step: int, measures: Mapping[str, float], scores: Mapping[str, float], best: str
    ) -> None:
        """Show the result of an evaluation as one aligned line, above the bar if there is one.

        Args:
            step: committed steps.
            measures: values on the held-out images, such as val loss, by display name.
            scores: shares of the held-out images in [0, 1], by display name.
            best: text about the best step so far.
        """
        if self.rank != 0:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(self._postfix)
        columns = [f"{name} {value:>9.4f}" for name, value in measures.items()]
        columns += [f"{name} {value:>7.2%}" for name, value in scores.items()]
        parts = [*columns, *filter(None, [best])] or ["evaluated, without a score"]
        self._print("  ".join([self._step(step), *parts]))

    def message(self, text: str) -> None:
        """Log one line, and show it in the terminal on rank 0."""
        log_line(text, sys.stdout)
        if self.rank == 0:
            self._print(self._folded(text))

    def fatal(self, text: str) -> None:
        """Log why the run ends, and show it in the terminal once, from any rank."""
        log_line(text, sys.stderr)
        if not self._said_fatal:
            self._said_fatal = True
            self._close_bar()
            with os.fdopen(os.dup(self._saved[1]), "w", encoding="utf-8") as terminal:
                terminal.write(text + "\n")

    def close(self) -> None:
        """Close the bar and connect the process to its terminal again."""
        self._close_bar()
        log_line("", sys.stdout, end="")
        log_line("", sys.stderr, end="")
        for target, saved in enumerate(self._saved, start=1):
            os.dup2(saved, target)
            os.close(saved)
        with suppress(OSError):
            self.terminal.close()

    def _print(self, text: str) -> None:
        with suppress(OSError):  # the output of a job is a file, and its disk may be full
            if self._bar is not None:
                self._bar.write(text, file=self.terminal)
            else:
                self.terminal.write(text + "\n")
                self.terminal.flush()

    def _columns(self) -> int | None:
        """Return the width of the terminal; None if it has no width or is not a terminal."""
        if not self.terminal.isatty():
            return None
        return os.get_terminal_size(self.terminal.fileno()).columns or None

    def _fitting(self, metrics: list[str]) -> str:
        """Return the first metrics that fit beside the bar, at least one."""
        room = (self._columns() or _UNKNOWN_COLUMNS) - _BAR_COLUMNS - 2 * len(str(self._total))
        while len(metrics) > 1 and len(" ".join(metrics)) > room:
            metrics = metrics[:-1]
        return " ".join(metrics)

    def _folded(self, text: str) -> str:
        """Break a line that is wider than the terminal between words; paths are not broken."""
        columns = self._columns()
        if columns is None or len(text) <= columns:
            return text
        return textwrap.fill(text, columns, break_long_words=False, break_on_hyphens=False)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _step(self, step: int) -> str:
        total = "" if self._total is None else f"/{self._total}"
        width = 2 * len(str(self._total)) + 1 if self._total else 8
        return f"step {f'{step}{total}':>{width}}"

    def _eta(self) -> str:
        began, first = self._started
        if self._share is None or first is None or self._share <= first:
            return "-"
        left = max(1.0 - self._share, 0.0) / (self._share - first)
        hours, rest = divmod(round((time.monotonic() - began) * left), 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
