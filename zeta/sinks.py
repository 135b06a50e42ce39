"""Where metrics go: one JSON object a line in metrics.jsonl, which everything else reads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

_HELD = 8192
"""Bytes of lines after which they are handed to the operating system."""


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


class JsonlFile:
    """An append-only file of JSON objects, each with a `step`, that a resume can cut.

    What a full disk does not take is kept, and written once there is room.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        """Open `path` to go on after `resume_step`; what lies beyond is kept as `.attempt-N`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_after(path, resume_step)
        self._file = path.open("ab", buffering=0)
        self._held = bytearray()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object."""
        self._held += (json.dumps(record) + "\n").encode()
        if len(self._held) >= _HELD:
            with suppress(OSError):  # `flush` tells of it, before anything depends on the lines
                self._hand_over()

    def flush(self) -> None:
        """Hand the lines to the operating system and wait for the disk.

        Raises:
            OSError: it did not take all of them; the others are kept.
        """
        self._hand_over()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close the file."""
        try:
            self.flush()
        finally:
            self._file.close()

    def _hand_over(self) -> None:
        while self._held:
            del self._held[: self._file.write(self._held)]


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


def cut_after(path: Path, last_step: int) -> None:
    """Keep only the lines of `path` up to `last_step`; move the rest to `path.attempt-N`.

    A line torn by a crash counts as beyond. The file is replaced, never truncated in place: a
    crash in here loses nothing.
    """
    if not path.exists():
        return
    kept: list[bytes] = []
    cut: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        step = _step_of(line)
        (kept if step is not None and step <= last_step and not cut else cut).append(line)
    if not cut:
        return
    attempt = 1
    while (aside := path.with_name(f"{path.name}.attempt-{attempt}")).exists():
        attempt += 1
    _write_whole(aside, cut)
    _write_whole(path, kept)


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
                if (step := _step_of(line)) is not None:
                    for name in json.loads(line):
                        steps[name] = max(step, steps.get(name, step))
    return steps


def _step_of(line: bytes) -> int | None:
    if not line.endswith(b"\n"):
        return None
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _write_whole(path: Path, lines: list[bytes]) -> None:
    building = path.with_name(f".tmp-{path.name}")
    with building.open("wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    building.replace(path)
