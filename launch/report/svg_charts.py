"""Draws charts of report.html with matplotlib, as SVG elements to be put into the page.

Their colours are CSS variables (`--ink`, `--series-1`, ...; see `COLOURS`), so that one drawing
serves light and dark mode; their text is in the font of the page; they are as wide as their box.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from launch.report.logged_run import Floats, Series

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
    "--series-5": "#1c1d1e",
    "--series-6": "#1f2021",
    "--series-7": "#222324",
    "--series-8": "#252627",
    "--danger": "#101112",
    "--band": "#131415",
}
CURVE_COLOURS = tuple(f"--series-{number}" for number in range(1, 9))
CURVE_STYLES = {"line": "-", "dashed": "--", "dotted": ":", "dashdot": "-."}
"""Kinds of line: the class in the style sheet, and matplotlib's name."""
Mark = tuple[str, str]
"""Kind of line and colour variable."""
WIDE, NARROW = (4.6, 2.5), (3.9, 2.35)
"""Sizes of a chart in inches: half a page wide, and a third. They set the size of its text."""

MAX_POINTS = 300
"""Most points of a curve; a longer one is averaged over equal stretches of steps."""


@dataclass(frozen=True)
class Events:
    """Restarts and checkpoints of a run, as positions on the axis."""

    restarts: Floats
    checkpoints: Floats
    colour: str = "--muted"
    """Colour variable."""


def line_chart(
    name: str,
    curves: Sequence[Series],
    *,
    format_value: Callable[[float], str],
    marks: Sequence[Mark] | None = None,
    events: Sequence[Events] = (),
    x_label: str = "step",
    size: tuple[float, float] = NARROW,
    smooth: bool = False,
    include: tuple[float, ...] = (),
    log: bool = False,
) -> str:
    """Return a chart of curves as an SVG element.

    Args:
        name: prefix of all ids in the SVG, unique in the page.
        curves: curves with at least one finite value each; `steps` are positions on the axis.
        format_value: writes a value at the y-axis.
        marks: line style of each curve; by default `curve_mark` of its index.
        events: drawn as vertical lines (restarts) and as ticks on the axis (checkpoints).
        x_label: label of the x-axis.
        size: WIDE or NARROW.
        smooth: draw the values pale, and their moving average over them.
        include: values that the y-axis always includes, such as 0.
        log: use a logarithmic y-axis if all values are positive.
    """

    def draw(axes: Axes) -> None:
        for index, curve in enumerate(curves):
            _draw_curve(axes, curve, marks[index] if marks else curve_mark(index), smooth)
        for happened in events:
            _draw_events(axes, happened)
        values = np.concatenate([curve.finite.values for curve in curves])
        if log and values.min() > 0:
            axes.set_yscale("log")
            _thin_log_ticks(axes)
        else:
            _set_range(axes, values, include)
        axes.yaxis.set_major_formatter(lambda value, _: format_value(value))
        axes.xaxis.set_major_formatter(lambda value, _: compact(value))
        axes.set_xlabel(x_label)

    return render(name, size, draw)


def compact(value: float) -> str:
    """Write a number in few characters: 950, 1.2k, 3.5M, 0.02, 2e-05."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.99995:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    """Write a share in per cent, with at most one decimal."""
    return f"{round(100 * value, 1):g}%"


def curve_mark(index: int) -> Mark:
    """Return the style of curve `index` of a chart: dashed once the colours run out."""
    rounds, colour = divmod(index, len(CURVE_COLOURS))
    return list(CURVE_STYLES)[rounds % len(CURVE_STYLES)], CURVE_COLOURS[colour]


def _draw_curve(axes: Axes, curve: Series, mark: Mark, smooth: bool) -> None:
    kind, variable = mark
    colour, style = COLOURS[variable], CURVE_STYLES[kind]
    drawn = _thin(curve.finite)
    steps, values = drawn.steps, drawn.values
    marker = "o" if len(values) == 1 else ""
    if smooth and len(values) >= 10:
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9)
        axes.plot(steps, _moving_average(values, len(values) // 20 + 1), style, color=colour)
    else:
        axes.plot(steps, values, style, color=colour, marker=marker)
    lost = curve.steps[~np.isfinite(curve.values)]
    if len(lost):  # a tick at the lower edge for each value that is not finite
        across = axes.get_xaxis_transform()
        floor = np.zeros(len(lost))
        axes.plot(lost, floor, "|", color=COLOURS["--danger"], transform=across, clip_on=False)


def _draw_events(axes: Axes, events: Events) -> None:
    colour = COLOURS[events.colour]
    for at in events.restarts:
        axes.axvline(at, color=colour, linestyle="--", linewidth=1.0)
    across = axes.get_xaxis_transform()
    ticks, floor = events.checkpoints, np.zeros(len(events.checkpoints))
    axes.plot(ticks, floor, "^", color=colour, markersize=3.5, transform=across, clip_on=False)


def _thin(series: Series) -> Series:
    """Average stretches of equally many points if there are more than MAX_POINTS."""
    if len(series.steps) <= MAX_POINTS:
        return series
    parts = [np.array_split(column, MAX_POINTS) for column in (series.steps, series.values)]
    steps, values = (np.array([part.mean() for part in column]) for column in parts)
    return Series(steps, values)


def _moving_average(values: Floats, width: int) -> Floats:
    """Return the mean over `width` points on either side, and over fewer towards the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(width, np.minimum(index, index[::-1]))
    mean: Floats = (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
    return mean


def _set_range(axes: Axes, values: Floats, include: tuple[float, ...]) -> None:
    shown = [float(values.min()), float(values.max()), *include]
    low, high = min(shown), max(shown)
    room = 0.08 * (high - low) or 0.08 * abs(high) or 1.0
    flat = low == high != 0  # drawn in the middle
    axes.set_ylim(
        low if low in include and not flat else low - room,
        high if high in include and low < high else high + room,
    )


def _thin_log_ticks(axes: Axes) -> None:
    """Label powers of ten, or 1-2-5 if the values span less than two of them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.get_ylim()
    steps = (1.0,) if math.log10(high / low) > 2 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=6))
    axes.yaxis.set_minor_formatter(NullFormatter())


def render(name: str, size: tuple[float, float], draw: Callable[[Axes], None]) -> str:
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
    """Turn an SVG file into an element of the page, with unique ids and CSS variables."""
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
