"""The runs of one report: their labels, colours and places on the x-axis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from launch.report.axes import AXES, along
from launch.report.logged_run import Floats, LoggedRun, Series
from launch.report.stretches import drawn_series, fit_width, last_lines, stretch_width
from launch.report.svg_charts import CURVE_COLOURS, CURVE_STYLES, Events, Mark, curve_mark

MAX_RUNS = len(CURVE_COLOURS)
"""Most runs in a report: as many as there are colours."""


@dataclass(frozen=True)
class ComparedRuns:
    """One run, or several to compare, along one x-axis.

    Raises:
        ValueError: a run is given twice, there are more than MAX_RUNS, or one did not log the
            metric of the axis.
    """

    runs: Sequence[LoggedRun]
    axis: str = "step"
    """One of `launch.report.axes.AXES`."""

    def __post_init__(self) -> None:
        if len(self.runs) > MAX_RUNS:
            raise ValueError(
                f"{len(self.runs)} runs are given: a report compares at most {MAX_RUNS}"
            )
        paths = [run.path.resolve() for run in self.runs]
        for path in paths:
            if paths.count(path) > 1:
                raise ValueError(f"{path} is given twice: compare different runs")
        for run in self.runs:
            along(run, self.axis, run.checkpoints)

    @property
    def first(self) -> LoggedRun:
        """The run that the report is about; the others are compared with it."""
        return self.runs[0]

    @property
    def several(self) -> bool:
        """True if the report compares runs."""
        return len(self.runs) > 1

    @cached_property
    def _unit(self) -> tuple[str, float]:
        """Return the label of the axis, and its unit as a multiple of the axis's own."""
        longest = max(float(along(run, self.axis, np.array([run.steps]))[0]) for run in self.runs)
        for unit, seconds in (("hours", 3600.0), ("minutes", 60.0)):
            if self.axis == "time" and longest >= 2 * seconds:
                return AXES["time"].replace("seconds", unit), seconds
        return AXES[self.axis], 1.0

    @property
    def axis_label(self) -> str:
        """Label of the axis."""
        return self._unit[0]

    @cached_property
    def labels(self) -> list[str]:
        """Names of the runs, with the directory where two have the same name."""
        names = [run.label for run in self.runs]
        return [
            f"{name} ({run.path})" if names.count(name) > 1 else name
            for name, run in zip(names, self.runs, strict=True)
        ]

    def mark(self, run: int, curve: int) -> Mark:
        """Return how to draw a curve: a colour for each run, or each curve of a single run."""
        if not self.several:
            return curve_mark(curve)
        return list(CURVE_STYLES)[curve % len(CURVE_STYLES)], CURVE_COLOURS[run]

    def curve_label(self, run: int, label: str, *, of_several: bool) -> str:
        """Return the label of a curve; `of_several`: its run has other curves in the chart."""
        if not self.several:
            return label
        return f"{self.labels[run]}: {label}" if of_several else self.labels[run]

    def curve(self, run: LoggedRun, metric: str) -> Series:
        """Return the points of a curve: the same stretches of the axis for all runs."""

        def place(steps: Floats) -> Floats:
            return self._on_axis(run, steps)

        return drawn_series(run, metric, place, self._width)

    def events(self) -> Iterator[Events]:
        """Yield the restarts and checkpoints of each run, as positions on the axis."""
        for number, run in enumerate(self.runs):
            yield Events(
                self._on_axis(run, run.restarts),
                self._on_axis(run, run.checkpoints),
                CURVE_COLOURS[number] if self.several else "--muted",
            )

    @cached_property
    def _width(self) -> float:
        """Width of a stretch on the axis: that of the longest lines, as many as can be shown."""
        widest = max(stretch_width(self._on_axis(run, last_lines(run))) for run in self.runs)
        end = max(float(self._on_axis(run, np.array([run.steps]))[0]) for run in self.runs)
        return fit_width(widest, end)

    @cached_property
    def steps_averaged(self) -> float:
        """Steps in the longest lines of all runs: rates are averaged over as many."""
        return max(stretch_width(last_lines(run)) for run in self.runs)

    def _on_axis(self, run: LoggedRun, steps: Floats) -> Floats:
        return along(run, self.axis, steps) / self._unit[1]
