"""Draws the charts of report.html over image sizes: accuracy by size, and histograms."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from launch.report.svg_charts import (
    COLOURS,
    CURVE_COLOURS,
    WIDE,
    Hover,
    curve_id,
    label_ticks,
    render,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LABELS = 9
"""Most points of the accuracy chart that get labels; more would overlap."""
MAX_BINS = 24
"""Most bars of a histogram."""


def accuracy_chart(
    name: str,
    runs: Sequence[Sequence[tuple[str, float]]],
    *,
    labels: Sequence[str] = (),
    trained: tuple[float, float] | None = None,
    x_label: str = "side of the image, pixels",
    size: tuple[float, float] = WIDE,
) -> str:
    """Return top-1 against the size of the image as an SVG element.

    Args:
        name: prefix of all ids in the SVG.
        runs: (size, top-1 as a share) pairs of each run. A size begins with a number; any other
            name, such as `native`, is drawn as a dashed line.
        labels: names of the runs, shown at the pointer.
        trained: smallest and largest size of training, shaded.
        x_label: label of the x-axis.
        size: WIDE or NARROW.
    """
    parsed = [[(side_of(word), top1) for word, top1 in rows] for rows in runs]
    points = [sorted((at, top1) for at, top1 in rows if at is not None) for rows in parsed]
    sides = sorted({at for rows in points for at, _ in rows})

    def draw(axes: Axes) -> None:
        low, high = (sides[0], sides[-1]) if sides else (0.0, 1.0)
        margin = 0.06 * (high - low) or 1.0
        if trained and sides:
            axes.axvspan(*trained, color=COLOURS["--band"], linewidth=0)
        for index, rows in enumerate(parsed):
            for top1 in (top1 for at, top1 in rows if at is None):
                level = "--series-2" if len(runs) == 1 else CURVE_COLOURS[index]
                axes.axhline(top1, color=COLOURS[level], linestyle="--")
            if points[index]:
                x, y = zip(*points[index], strict=True)
                colour = COLOURS[CURVE_COLOURS[index]]
                gid = curve_id(index)
                axes.plot(x, y, color=colour, marker="o", markersize=4.5, gid=gid)
        if sides and len(sides) <= MAX_LABELS:
            axes.set_xticks(sides)
            if len(runs) == 1:
                _label_points(axes, *zip(*points[0], strict=True))
        if sides:
            axes.set_xlabel(x_label)
        else:
            axes.set_xticks([])
        axes.set_xlim(low - margin, high + margin)
        values = np.array([top1 for rows in runs for _, top1 in rows])
        span = max(float(np.ptp(values)), 0.02)
        axes.set_ylim(values.min() - 0.25 * span, values.max() + 0.25 * span)
        label_ticks(axes.yaxis, as_share=True)
        label_ticks(axes.xaxis)
        axes.set_ylabel("top-1")

    return render(name, size, draw, hover=Hover(tuple(labels), x_label, as_share=True))


def histogram_chart(
    name: str,
    counts: Sequence[Mapping[float, int]],
    *,
    x_label: str,
    format_value: Callable[[float], str],
    size: tuple[float, float] = WIDE,
) -> str:
    """Return the histograms of all runs in one chart, as an SVG element.

    Args:
        name: prefix of all ids in the SVG.
        counts: how often each value occurs, by run; not all may be empty.
        x_label: label of the x-axis.
        format_value: writes a value at the x-axis.
        size: WIDE or NARROW.
    """
    everything = np.array(sorted({value for each in counts for value in each}))
    low, high = float(everything[0]), float(everything[-1])
    room = 0.5 * (high - low) / MAX_BINS or 0.5 * abs(high) or 0.5
    edges = np.linspace(low - room, high + room, min(MAX_BINS, 2 * len(everything) - 1) + 1)

    def draw(axes: Axes) -> None:
        for index, each in enumerate(counts):
            values, weights = np.array(list(each)), np.array(list(each.values()), np.float64)
            shares, _ = np.histogram(values, edges, weights=weights / weights.sum())
            colour = COLOURS[CURVE_COLOURS[index]]
            axes.stairs(shares, edges, color=colour, fill=len(counts) == 1, linewidth=1.6)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel("share of the images")
        label_ticks(axes.yaxis, as_share=True)
        axes.xaxis.set_major_formatter(lambda value, _: format_value(value))

    return render(name, size, draw)


def side_of(word: str) -> float | None:
    """Return the side in pixels at the beginning of a size such as 48, 48px or 48x64."""
    match = re.match(r"\d+(?:\.\d+)?", word)
    return float(match[0]) if match else None


def _label_points(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """Label each point in per cent: below it if its neighbours are higher, else above."""
    for i, (side, top1) in enumerate(zip(x, y, strict=True)):
        around = [y[j] for j in (i - 1, i + 1) if 0 <= j < len(y)]
        below = bool(around) and top1 < float(np.mean(around))
        axes.annotate(
            f"{100 * top1:.1f}", (side, top1), xytext=(0, -12 if below else 6),
            textcoords="offset points", ha="center", fontsize="small", color=COLOURS["--ink"],
        )  # fmt: skip
