"""Prints the status of a run: a few lines for people, or one object for programs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from launch.status.state import OVER, Status, duration
from zeta.run.directory import RunDir

_LABEL = 13
_NARROWEST = 24
_MOST_STUCK = 8
_COLOURS = {"running": 32, "finished": 32, "failed": 31, "unknown": 33, "stopped": 33}
_CLEAR_REST, _HOME, _CLEAR_LINE = "\x1b[J", "\x1b[H", "\x1b[K"
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"


def status_object(status: Status) -> dict[str, Any]:
    """Return what `--json` prints."""
    return asdict(status)


def status_lines(status: Status, columns: int | None = None) -> list[str]:
    """Return the lines that describe a status, each cut to `columns` characters if given."""
    rows = [(status.name, f"{status.state}: {status.why}")]
    rows += [(label, text) for label, text in _rows(status) if text]
    lines = [f"{label:<{_LABEL}} {text}" for label, text in rows]
    width = None if columns is None else max(columns, _NARROWEST)
    return [_cut(line, width) for line in lines]


def _rows(status: Status) -> list[tuple[str, str]]:
    stuck = [f"rank {s.rank} on {s.host}, {s.phase}: {s.why}" for s in status.stuck]
    if len(stuck) > _MOST_STUCK:
        stuck[_MOST_STUCK:] = [f"and {len(stuck) - _MOST_STUCK} more"]
    return [
        ("job", status.job or ""),
        ("step", _step(status)),
        ("time left", "" if status.eta_s is None else f"about {duration(status.eta_s)}"),
        ("throughput", _throughput(status)),
        ("loss", _loss(status)),
        ("checkpoint", _checkpoint(status)),
        ("ranks", _ranks(status)),
        ("slowest rank", _slowest(status)),
        *((("stuck" if index == 0 else ""), text) for index, text in enumerate(stuck)),
        ("restarts", _restarts(status)),
        ("quarantine", f"{status.quarantined:,} images" if status.quarantined else "none"),
        ("last error", "" if status.state in OVER else status.error or "none in the logs"),
    ]


def _step(status: Status) -> str:
    if status.step is None:
        return "nothing logged yet"
    if not status.of_steps:
        return f"{status.step:,}"
    return f"{status.step:,} of {status.of_steps:,} ({status.step / status.of_steps:.1%})"


def _throughput(status: Status) -> str:
    if status.images_per_s is None:
        return ""
    parts = [f"{status.images_per_s:,.1f} images/s"]
    if status.tokens_per_s is not None:
        parts.append(f"{status.tokens_per_s:,.0f} tokens/s")
    if status.step_s is not None:
        parts.append(f"{status.step_s:.3g} s/step")
    return ", ".join(parts)


def _loss(status: Status) -> str:
    if status.loss is None:
        return ""
    best = "" if status.best is None else f"; best validation score {status.best:.2%}"
    return f"{status.loss:.4f}{best}"


def _checkpoint(status: Status) -> str:
    if status.checkpoint_step is None or status.checkpoint_age_s is None:
        return "none yet"
    return f"step {status.checkpoint_step:,}, {duration(status.checkpoint_age_s)} ago"


def _ranks(status: Status) -> str:
    phases = ", ".join(f"{count} in {phase}" for phase, count in status.phases.items())
    if not status.ranks:
        return ""
    return f"{status.ranks} ({phases})" if phases else f"{status.ranks}"


def _slowest(status: Status) -> str:
    if status.slowest_rank is None or status.slowest_ratio is None or status.ranks < 2:
        return ""
    host = f" on {status.slowest_host}" if status.slowest_host else ""
    return f"rank {status.slowest_rank}{host}, {status.slowest_ratio:.2f} times the mean"


def _restarts(status: Status) -> str:
    stalled = (
        f"; {status.stalled} starts in a row without a new checkpoint" if status.stalled else ""
    )
    return f"{status.restarts}{stalled}"


def _cut(line: str, width: int | None) -> str:
    printable = "".join(c if c.isprintable() else " " for c in line)
    if width is None or len(printable) <= width:
        return printable
    return printable[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"


class Screen:
    """The display of `zeta launch watch`: in place on a terminal, else one line for each change.

    `rich.live` would save some 20 of these lines, but needs four packages (rich, markdown-it-py,
    mdurl, pygments) and 0.2 s at each start.
    """

    def __init__(
        self, out: IO[str] = sys.stdout, environment: Mapping[str, str] = os.environ
    ) -> None:
        self._out = out
        self._live = out.isatty() and environment.get("TERM", "") not in ("", "dumb")
        self._colour = self._live and "NO_COLOR" not in environment
        self._last: list[str] = []

    def __enter__(self) -> Screen:
        if self._live:
            self._out.write(_ENTER)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._out.write(_LEAVE)
            self._out.write("".join(f"{line}\n" for line in self._last))  # remains on the screen
        self._out.flush()

    def show(self, status: Status, every_s: float) -> None:
        """Display a status."""
        if not self._live:
            line = _one_line(status)
            if self._last != [line]:
                self._out.write(f"{time.strftime('%H:%M:%S')} {line}\n")
                self._out.flush()
            self._last = [line]
            return
        size = os.get_terminal_size(self._out.fileno())
        columns, rows = size.columns or 80, size.lines or 24
        lines = status_lines(status, columns - 1)
        self._last = lines
        now = time.strftime("%H:%M:%S")
        foot = f"{now}, updated every {every_s:g} s; Ctrl-C does not stop the run"
        shown = [*lines[: max(1, rows - 2)], _cut(foot, max(columns - 1, 1))]
        if self._colour and (colour := _COLOURS.get(status.state)):
            shown[0] = f"\x1b[1;{colour}m{shown[0]}\x1b[0m"
        text = "\n".join(line + _CLEAR_LINE for line in shown)
        self._out.write(_HOME + text + _CLEAR_REST)
        self._out.flush()


def _one_line(status: Status) -> str:
    step = _step(status) if status.step is None else f"step {_step(status)}"
    texts = (step, _throughput(status), f"checkpoint: {_checkpoint(status)}")
    stuck = f"stuck ranks: {len(status.stuck)}" if status.stuck else ""
    return "  ".join(filter(None, [status.state, *texts, stuck]))


def watch(take: Callable[[], Status], every_s: float, screen: Screen) -> None:
    """Display what `take` returns every `every_s` seconds, until the run is finished or Ctrl-C."""
    try:
        with screen:
            while True:
                status = take()
                screen.show(status, every_s)
                if status.state == "finished":
                    return
                time.sleep(every_s)
    except KeyboardInterrupt:
        return


def wait_for_run(run_dir: Path, every_s: float, out: IO[str] | None = None) -> bool:
    """Wait until a folder is the directory of a run; return False if Ctrl-C ended that.

    A job may still wait in the queue, and makes the folder when it starts; a recipe may have only
    its shards there. What is there and is no run is left to `take_snapshot` to refuse.
    """
    out = out or sys.stderr
    said = False
    try:
        while not run_dir.exists() or _may_become_a_run(RunDir(run_dir)):
            if not said:
                text = f"zeta: waiting for a run in {run_dir}; Ctrl-C ends this"
                print(text, file=out, flush=True)
                said = True
            time.sleep(min(every_s, 1.0))
    except KeyboardInterrupt:
        return False
    return True


def _may_become_a_run(run_dir: RunDir) -> bool:
    return run_dir.path.is_dir() and not run_dir.is_marked() and not run_dir.foreign_names()
