"""Where metrics go: one JSON object a line in metrics.jsonl, which everything else reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from zeta.run.jsonl import JsonlFile, step_of_line


class MetricSink(Protocol):
    """A place that metrics are logged to."""

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Log `values`, by metric name, of the step that made `step` committed steps."""
        ...

    def flush(self) -> None:
        """Make sure that what was logged outlives this process."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class JsonlSink:
    """metrics.jsonl: `step` and the metrics logged at it.

    A disk that is full for a while delays its lines, and does not end the run.

    Args:
        path: the file.
        resume_step: what it holds of later steps is cut.
        say: told once when the disk takes no more.
    """

    def __init__(self, path: Path, resume_step: int, say: Callable[[str], None] = print) -> None:
        self._path, self._say = path, say
        self._lines = JsonlFile(path, resume_step)
        self._told = False

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Append one line, and hand it over at once so that it can be watched."""
        self._lines.write({"step": step, **values})
        try:
            self._lines.flush()
            self._told = False
        except OSError as error:
            if not self._told:
                self._say(
                    f"WARNING: {self._path} cannot be written ({error.strerror}): free some space; "
                    "its lines are kept in memory until then"
                )
            self._told = True

    def flush(self) -> None:
        """Bring what was held back to the disk; OSError: it takes no more."""
        self._lines.flush()

    def close(self) -> None:
        """Close the file."""
        try:
            self._lines.close()
        except OSError as error:
            self._say(f"WARNING: the last lines of {self._path} are lost ({error.strerror})")


class NoSink:
    """Where the metrics of all ranks but the first go."""

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class WithAxes:
    """A sink each of whose rows can be drawn over images or tokens as well as over steps.

    Args:
        sink: where the rows go.
        axes: returns what to add to a row of a step, by metric name.
    """

    def __init__(self, sink: MetricSink, axes: Callable[[int], Mapping[str, float]]) -> None:
        self._sink, self._axes = sink, axes

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Log the values and the axes."""
        self._sink.log(step, {**self._axes(step), **values})

    def flush(self) -> None:
        """Flush the sink."""
        self._sink.flush()

    def close(self) -> None:
        """Close the sink."""
        self._sink.close()


class OnlyNew:
    """A sink that is not told again what it has, such as the steps that a restart replays.

    Args:
        sink: where the rest goes.
        logged: the last step of each metric that it has.
    """

    def __init__(self, sink: MetricSink, logged: Mapping[str, int]) -> None:
        self._sink, self._logged = sink, logged

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Log the values that are new."""
        new = {name: value for name, value in values.items() if step > self._logged.get(name, -1)}
        if new:
            self._sink.log(step, new)

    def flush(self) -> None:
        """Flush the sink."""
        self._sink.flush()

    def close(self) -> None:
        """Close the sink."""
        self._sink.close()


def last_logged_steps(path: Path, *, ever: bool = False) -> dict[str, int]:
    """Return the last step at which each metric was logged to `path`.

    Args:
        path: metrics.jsonl.
        ever: count what was cut from it as well.
    """
    steps: dict[str, int] = {}
    for file in [path, *(path.parent.glob(f"{path.name}.attempt-*") if ever else ())]:
        if file.exists():
            for line in file.read_bytes().splitlines(keepends=True):
                if (step := step_of_line(line)) is not None:
                    for name in json.loads(line):
                        steps[name] = max(step, steps.get(name, step))
    return steps
