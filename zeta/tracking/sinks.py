"""Metric sinks. All metrics go to metrics.jsonl, one JSON object a line; all else reads that."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from zeta.run.jsonl import JsonlFile, step_of_line


class MetricSink(Protocol):
    """A place that metrics are logged to."""

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Log values by metric name; `step` counts the committed steps."""
        ...

    def flush(self) -> None:
        """Bring what was logged to the disk, so that it survives a crash."""
        ...

    def close(self) -> None:
        """Flush, and accept no more."""
        ...


class JsonlSink:
    """Writer of metrics.jsonl, whose lines hold `step` and the metrics logged at it.

    A full disk delays its lines, and does not end the run.

    Args:
        path: the file.
        resume_step: lines of later steps are cut from the file.
        notify: called with a message, once, when the disk is full.
    """

    def __init__(self, path: Path, resume_step: int, notify: Callable[[str], None] = print) -> None:
        self._path, self._notify = path, notify
        self._lines = JsonlFile(path, resume_step)
        self._notified = False

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Append one line, and write it at once so that others can follow the file."""
        self._lines.write({"step": step, **values})
        try:
            self._lines.flush()
            self._notified = False
        except OSError as error:
            if not self._notified:
                self._notify(
                    f"WARNING: {self._path} cannot be written ({error.strerror}): free some space; "
                    "its lines are kept in memory until then"
                )
            self._notified = True

    def flush(self) -> None:
        """Bring what was logged to the disk.

        Raises:
            OSError: the disk is full; the lines are kept in memory.
        """
        self._lines.flush()

    def close(self) -> None:
        """Close the file."""
        try:
            self._lines.close()
        except OSError as error:
            self._notify(f"WARNING: the last lines of {self._path} are lost ({error.strerror})")


class NoSink:
    """Sink of all ranks but the first, which drops what it gets."""

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class SinkOfAll:
    """Sink that passes everything on to several sinks, in their order."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = tuple(sinks)

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Log the values to each."""
        for sink in self._sinks:
            sink.log(step, values)

    def flush(self) -> None:
        """Flush each."""
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Close each."""
        for sink in self._sinks:
            sink.close()


class WithAxes:
    """Sink that adds the images and tokens seen to each row, so that it can be drawn over them.

    Args:
        sink: receives the rows.
        axes: returns the values to add to a row, by metric name, for its step.
    """

    def __init__(self, sink: MetricSink, axes: Callable[[int], Mapping[str, float]]) -> None:
        self._sink, self._axes = sink, axes

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Log the values and those of the axes."""
        self._sink.log(step, {**self._axes(step), **values})

    def flush(self) -> None:
        """Flush the sink."""
        self._sink.flush()

    def close(self) -> None:
        """Close the sink."""
        self._sink.close()


class OnlyNew:
    """Sink that drops what was logged before, such as the steps that a restart replays.

    Args:
        sink: receives the rest.
        logged: last logged step of each metric.
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
        ever: also count lines that were cut from it (`.attempt-N`).
    """
    steps: dict[str, int] = {}
    for file in [path, *(path.parent.glob(f"{path.name}.attempt-*") if ever else ())]:
        if file.exists():
            for line in file.read_bytes().splitlines(keepends=True):
                if (step := step_of_line(line)) is not None:
                    for name in json.loads(line):
                        steps[name] = max(step, steps.get(name, step))
    return steps
