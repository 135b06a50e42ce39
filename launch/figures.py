"""The charts of report.html: matplotlib draws them, style sheet variables colour them.

Each chart is an SVG element to be put into a page. Its colours are the variables of `COLOURS`
(`--ink`, `--series-1`, ...), so one drawing serves light and dark; its text is text, in the font
of the page; its width is that of the box it stands in.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from launch.run_record import Floats, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib knows no CSS variables, so it draws in these colours, which nothing else uses.
COLOURS = {
    "--ink": "#010203",
    "--muted": "#040506",
    "--grid": "#070809",
    "--series-1": "#0a0b0c",
    "--series-2": "#0d0e0f",
    "--series-3": "#161718",
    "--series-4": "#191a1b",
    "--danger": "#101112",
    "--band": "#131415",
}
CURVE_COLOURS = ("--series-1", "--series-2", "--series-3", "--series-4")
WIDE, NARROW = (4.6, 2.5), (3.9, 2.35)
"""Sizes of a chart in inches: of half a page and of a third. They decide the size of its text."""

MAX_POINTS = 300
"""Points of a curve; a longer one is averaged over equal stretches of steps."""
MAX_LABELS = 9
"""Points of the accuracy chart that are labelled; more would overlap."""


def line_chart(
    name: str,
    curves: Sequence[Series],
    *,
    format_value: Callable[[float], str],
    size: tuple[float, float] = NARROW,
    smooth: bool = False,
    include: tuple[float, ...] = (),
    log: bool = False,
) -> str:
    """Return curves over the step as an SVG element.

    Args:
        name: prefix of all ids in the SVG, unique in the page.
        curves: each with at least one finite value; `curve_mark` tells them apart.
        format_value: writes a value at the axis.
        size: WIDE or NARROW.
        smooth: draw the values pale, and over them their moving average.
        include: values that the axis shows in any case, such as 0.
        log: logarithmic axis, unless a value is not positive.
    """

    def draw(axes: Axes) -> None:
        for index, curve in enumerate(curves):
            _draw_curve(axes, curve, index, smooth)
        values = np.concatenate([curve.finite.values for curve in curves])
        if log and values.min() > 0:
            axes.set_yscale("log")
            _thin_log_ticks(axes)
        else:
            _set_range(axes, values, include)
        axes.yaxis.set_major_formatter(lambda value, _: format_value(value))
        axes.xaxis.set_major_formatter(lambda value, _: compact(value))
        axes.set_xlabel("step")

    return _render(name, size, draw)


def accuracy_chart(
    name: str,
    by_resolution: Sequence[tuple[str, float]],
    *,
    trained: tuple[float, float] | None = None,
    size: tuple[float, float] = WIDE,
) -> str:
    """Return top-1 against resolution as an SVG element.

    Args:
        name: prefix of all ids in the SVG.
        by_resolution: (resolution, top-1 as a share). A name that begins with a number is a side
            in pixels; of the others (`native`) each is a dashed line.
        trained: smallest and largest side that the model was trained at, shaded.
        size: WIDE or NARROW.
    """
    parsed = [(side_of(word), top1) for word, top1 in by_resolution]
    sides = sorted((side, top1) for side, top1 in parsed if side is not None)
    levels = [top1 for side, top1 in parsed if side is None]

    def draw(axes: Axes) -> None:
        low, high = (sides[0][0], sides[-1][0]) if sides else (0.0, 1.0)
        margin = 0.06 * (high - low) or 1.0
        if trained and sides:
            axes.axvspan(*trained, color=COLOURS["--band"], linewidth=0)
        for top1 in levels:
            axes.axhline(top1, color=COLOURS["--series-2"], linestyle="--")
        if sides:
            x, y = zip(*sides, strict=True)
            axes.plot(x, y, color=COLOURS["--series-1"], marker="o", markersize=4.5)
            if len(sides) <= MAX_LABELS:
                _label_points(axes, x, y)
                axes.set_xticks(x)
            axes.set_xlabel("side of the image, pixels")
        else:
            axes.set_xticks([])
        axes.set_xlim(low - margin, high + margin)
        values = np.array([top1 for _, top1 in by_resolution])
        span = max(float(np.ptp(values)), 0.02)
        axes.set_ylim(values.min() - 0.25 * span, values.max() + 0.25 * span)
        axes.yaxis.set_major_formatter(lambda value, _: percent(value))
        axes.xaxis.set_major_formatter(lambda value, _: compact(value))

    return _render(name, size, draw)


def compact(value: float) -> str:
    """Write a number in few characters: 950, 1.2k, 3.5M, 0.02, 2e-05."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.99995:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    """Write a share as per cent, with a decimal where it has one."""
    return f"{round(100 * value, 1):g}%"


def curve_mark(index: int) -> tuple[str, str]:
    """Return (kind of line, colour variable) of a chart's curve: dashed once colours run out."""
    rounds, colour = divmod(index, len(CURVE_COLOURS))
    return "dashed" if rounds % 2 else "line", CURVE_COLOURS[colour]


def _draw_curve(axes: Axes, curve: Series, index: int, smooth: bool) -> None:
    kind, variable = curve_mark(index)
    colour, style = COLOURS[variable], "--" if kind == "dashed" else "-"
    drawn = _thin(curve.finite)
    steps, values = drawn.steps, drawn.values
    marker = "o" if len(values) == 1 else ""
    if smooth and len(values) >= 10:
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9)
        axes.plot(steps, _moving_average(values, len(values) // 20 + 1), style, color=colour)
    else:
        axes.plot(steps, values, style, color=colour, marker=marker)
    lost = curve.steps[~np.isfinite(curve.values)]
    if len(lost):  # a tick at the lower edge for every step that has no number
        across = axes.get_xaxis_transform()
        floor = np.zeros(len(lost))
        axes.plot(lost, floor, "|", color=COLOURS["--danger"], transform=across, clip_on=False)


def _thin(series: Series) -> Series:
    """Average stretches of equally many points where there are too many to see."""
    if len(series.steps) <= MAX_POINTS:
        return series
    parts = [np.array_split(column, MAX_POINTS) for column in (series.steps, series.values)]
    steps, values = (np.array([part.mean() for part in column]) for column in parts)
    return Series(steps, values)


def _moving_average(values: Floats, width: int) -> Floats:
    """Return the mean over `width` points to either side, evenly fewer towards the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(width, np.minimum(index, index[::-1]))
    mean: Floats = (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
    return mean


def _set_range(axes: Axes, values: Floats, include: tuple[float, ...]) -> None:
    shown = [float(values.min()), float(values.max()), *include]
    low, high = min(shown), max(shown)
    room = 0.08 * (high - low) or 0.08 * abs(high) or 1.0
    axes.set_ylim(low if low in include else low - room, high if high in include else high + room)


def _label_points(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """Write per cent at each point: below it where its neighbours are higher, else above."""
    for i, (side, top1) in enumerate(zip(x, y, strict=True)):
        around = [y[j] for j in (i - 1, i + 1) if 0 <= j < len(y)]
        below = bool(around) and top1 < float(np.mean(around))
        axes.annotate(
            f"{100 * top1:.1f}", (side, top1), xytext=(0, -12 if below else 6),
            textcoords="offset points", ha="center", fontsize="small", color=COLOURS["--ink"],
        )  # fmt: skip


def _thin_log_ticks(axes: Axes) -> None:
    """Label powers of ten, or 1-2-5 where the values span less than two of them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.get_ylim()
    steps = (1.0,) if math.log10(high / low) > 2 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=6))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _render(name: str, size: tuple[float, float], draw: Callable[[Axes], None]) -> str:
    """Draw on fresh axes and return the SVG element, its ids prefixed with `name`."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": name,  # ids, and so the file, are the same each time
            "font.size": 8.0 if size == WIDE else 9.0,
            "lines.linewidth": 1.8,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.edgecolor": COLOURS["--grid"],
            "axes.labelcolor": COLOURS["--muted"],
            "grid.color": COLOURS["--grid"],
            "text.color": COLOURS["--ink"],
            "xtick.color": COLOURS["--muted"],
            "ytick.color": COLOURS["--muted"],
            "ytick.major.size": 0,
            "ytick.minor.size": 0,
        }
    )
    with style:
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.locator_params(nbins=5)
        draw(axes)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(target.getvalue(), name)


def _for_page(svg: str, name: str) -> str:
    """Turn a file into an element: no prologue or metadata, own ids, colours by variable."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = svg.replace("xlink:href", "href")
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None, "matplotlib writes a viewBox"
    svg = re.sub(r"<svg[^>]*>", f'<svg {view_box[0]} aria-hidden="true">', svg, count=1)
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*\n", "\n", svg)


def side_of(word: str) -> float | None:
    """Return the side in pixels that a resolution's name begins with: 48, 48px, 48x64."""
    match = re.match(r"\d+(?:\.\d+)?", word)
    return float(match[0]) if match else None
