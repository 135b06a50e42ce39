"""The runs that one report is about, and what tells them apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from launch.report.axes import AXES, along
from launch.report.figures import CURVE_COLOURS, CURVE_STYLES, Events, Mark, curve_mark
from launch.report.record import Floats, RunRecord, Series

MAX_RUNS = len(CURVE_COLOURS)
"""Runs that colours tell apart."""


@dataclass(frozen=True)
class RunSet:
    """One run, or several to compare, along one axis.

    Raises:
        ValueError: a run is given twice, there are more than colours tell apart, or one did not
            log what the axis takes.
    """

    runs: Sequence[RunRecord]
    axis: str = "step"
    """One of `launch.report.axes.AXES`."""

    def __post_init__(self) -> None:
        if len(self.runs) > MAX_RUNS:
            raise ValueError(f"{len(self.runs)} runs; a report compares at most {MAX_RUNS}")
        paths = [run.path.resolve() for run in self.runs]
        for path in paths:
            if paths.count(path) > 1:
                raise ValueError(f"{path} is given twice; compare different runs")
        for run in self.runs:
            along(run, self.axis, run.checkpoints)

    @property
    def first(self) -> RunRecord:
        """The run that the report is about, before it is compared with others."""
        return self.runs[0]

    @property
    def several(self) -> bool:
        """Whether runs are compared."""
        return len(self.runs) > 1

    @cached_property
    def _unit(self) -> tuple[str, float]:
        """Name of what the axis is marked with, and how much of the axis's own unit it is."""
        longest = max(float(along(run, self.axis, np.array([run.steps]))[0]) for run in self.runs)
        for unit, seconds in (("hours", 3600.0), ("minutes", 60.0)):
            if self.axis == "time" and longest >= 2 * seconds:
                return AXES["time"].replace("seconds", unit), seconds
        return AXES[self.axis], 1.0

    @property
    def axis_label(self) -> str:
        """What the axis is."""
        return self._unit[0]

    @cached_property
    def labels(self) -> list[str]:
        """What each run is called: its name, with its directory where the name is another's too."""
        names = [run.label for run in self.runs]
        return [
            f"{name} ({run.path})" if names.count(name) > 1 else name
            for name, run in zip(names, self.runs, strict=True)
        ]

    def mark(self, run: int, curve: int) -> Mark:
        """Return how a curve is drawn: of several runs each has a colour, of one each curve."""
        if not self.several:
            return curve_mark(curve)
        return list(CURVE_STYLES)[curve % len(CURVE_STYLES)], CURVE_COLOURS[run]

    def curve_label(self, run: int, label: str, *, of_several: bool) -> str:
        """Return what a legend calls a curve, which may be one of several of its run."""
        if not self.several:
            return label
        return f"{self.labels[run]}: {label}" if of_several else self.labels[run]

    def place(self, run: RunRecord, series: Series) -> Series:
        """Return a series with its steps moved to where they lie on the axis."""
        return Series(self._on_axis(run, series.steps), series.values)

    def events(self) -> Iterator[Events]:
        """Yield the restarts and checkpoints of each run, on the axis."""
        for number, run in enumerate(self.runs):
            yield Events(
                self._on_axis(run, run.restarts),
                self._on_axis(run, run.checkpoints),
                CURVE_COLOURS[number] if self.several else "--muted",
            )

    def _on_axis(self, run: RunRecord, steps: Floats) -> Floats:
        return along(run, self.axis, steps) / self._unit[1]
