"""Draws charts of report.html with matplotlib, as SVG elements to be put into the page.

Their colours are CSS variables (`--ink`, `--series-1`, ...; see `COLOURS`), so that one drawing
serves light and dark mode; their text is in the font of the page; they are as wide as their box.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from launch.report.logged_run import Floats, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

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


@dataclass(frozen=True)
class Hover:
    """What `page.js` tells about a chart at the pointer."""

    labels: tuple[str, ...]
    """Name of each curve (`curve_id`)."""
    x_label: str
    as_share: bool
    """Whether values are shares, to be written in per cent."""
    zoom: bool = False
    """Whether dragging over the chart zooms in."""


def curve_id(index: int) -> str:
    """Return the id of the curve whose values are told at the pointer."""
    return f"curve_{index}"


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
    labels: Sequence[str] = (),
    x_label: str = "step",
    y_label: str = "",
    size: tuple[float, float] = NARROW,
    smooth: bool = False,
    include: tuple[float, ...] = (),
    log: bool = False,
) -> str:
    """Return a chart of curves as an SVG element.

    Args:
        name: prefix of all ids in the SVG, unique in the page.
        curves: curves with at least one finite value each; `steps` are positions on the axis. For
            `smooth`, those of different curves lie equally far apart.
        format_value: `percent` if the values are shares, else `compact`.
        marks: line style of each curve; by default `curve_mark` of its index.
        events: drawn as vertical lines (restarts) and as ticks on the axis (checkpoints).
        labels: names of the curves, shown at the pointer.
        x_label: label of the x-axis.
        y_label: quantity and unit of the y-axis.
        size: WIDE or NARROW.
        smooth: draw the values pale, and their moving average over them.
        include: values that the y-axis always includes, such as 0.
        log: use a logarithmic y-axis if all values are positive.
    """

    as_share = format_value is percent

    def draw(axes: Axes) -> None:
        longest = max(len(curve.finite.values) for curve in curves)
        width = longest // 20 + 1 if smooth and longest >= 10 else 0  # one for all curves
        for index, curve in enumerate(curves):
            _draw_curve(axes, curve, marks[index] if marks else curve_mark(index), width, index)
        for number, happened in enumerate(events):
            _draw_events(axes, happened, number)
        values = np.concatenate([curve.finite.values for curve in curves])
        if log and values.min() > 0:
            axes.set_yscale("log")
            _set_log_ticks(axes)
        else:
            _set_range(axes, values, include)
        if x_label == "step":
            axes.locator_params("x", integer=True)
        label_ticks(axes.yaxis, as_share)
        label_ticks(axes.xaxis)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return render(name, size, draw, hover=Hover(tuple(labels), x_label, as_share, zoom=True))


def compact(value: float, digits: int = 3) -> str:
    """Write a number in few characters: 950, 1.2k, 3.5M, 0.02, 2e-05."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.99995:
            return f"{value / limit:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def label_ticks(axis: Axis, as_share: bool = False) -> None:
    """Label the ticks of an axis with as few digits as tell them apart; shares in per cent."""
    scale, unit = (100.0, "%") if as_share else (1.0, "")

    def write(value: float, _: object) -> str:
        ticks = scale * np.unique(axis.get_majorticklocs())
        gap = float(np.diff(ticks).min()) if len(ticks) > 1 else np.inf
        exact = (
            digits
            for digits in range(3, 9)
            if all(abs(float(f"{tick:.{digits}g}") - tick) <= 0.01 * gap for tick in ticks)
        )
        return compact(scale * value, next(exact, 9)) + unit

    axis.set_major_formatter(write)


def percent(value: float) -> str:
    """Write a share in per cent, with at most one decimal."""
    return f"{round(100 * value, 1):g}%"


def curve_mark(index: int) -> Mark:
    """Return the style of curve `index` of a chart: dashed once the colours run out."""
    rounds, colour = divmod(index, len(CURVE_COLOURS))
    return list(CURVE_STYLES)[rounds % len(CURVE_STYLES)], CURVE_COLOURS[colour]


def _draw_curve(axes: Axes, curve: Series, mark: Mark, smooth: int, index: int) -> None:
    """Draw a curve; `smooth`: points on either side of its moving average, 0 for none."""
    kind, variable = mark
    colour, style = COLOURS[variable], CURVE_STYLES[kind]
    drawn = curve.finite
    steps, values = drawn.steps, drawn.values
    if smooth and len(values) > 1:
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9, gid=f"pale_{index}")
        values = _moving_average(values, smooth)
    marker = "o" if len(values) == 1 else ""
    axes.plot(steps, values, style, color=colour, marker=marker, gid=curve_id(index))
    lost = curve.steps[~np.isfinite(curve.values)]
    if len(lost):  # a tick at the lower edge for each value that is not finite
        across = axes.get_xaxis_transform()
        (ticks,) = axes.plot(lost, np.zeros(len(lost)), "|", transform=across, clip_on=False)
        ticks.set(color=COLOURS["--danger"], gid=f"lost_{index}")


def _draw_events(axes: Axes, events: Events, number: int) -> None:
    colour = COLOURS[events.colour]
    for place, at in enumerate(events.restarts):
        gid = f"restart_{number}_{place}"
        axes.axvline(at, color=colour, linestyle="--", linewidth=1.0, gid=gid)
    across = axes.get_xaxis_transform()
    at, floor = events.checkpoints, np.zeros(len(events.checkpoints))
    (ticks,) = axes.plot(at, floor, "^", markersize=3.5, transform=across, clip_on=False)
    ticks.set(color=colour, gid=f"saves_{number}")


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


def _set_log_ticks(axes: Axes) -> None:
    """Label powers of ten, or 1-2-5 on a narrower axis, or equal distances on the narrowest."""
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator

    low, high = axes.get_ylim()
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    for subs in ((1.0,), (1.0, 2.0, 5.0)):
        decades = LogLocator(base=10, subs=subs, numticks=6)
        if sum(low <= tick <= high for tick in decades.tick_values(low, high)) >= 3:
            axes.yaxis.set_major_locator(decades)
            return
    even = MaxNLocator(5).tick_values(low, high)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in even if low <= tick <= high]))


def render(
    name: str,
    size: tuple[float, float],
    draw: Callable[[Axes], None],
    hover: Hover | None = None,
) -> str:
    """Draw on fresh axes and return the SVG element, its ids prefixed with `name`.

    Args:
        name: prefix of all ids.
        size: width and height in inches.
        draw: draws on the axes.
        hover: what the pointer tells; None: nothing.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": name,  # ids, and so the file, are the same each time
            "path.simplify": False,  # page.js reads the values of curves from their paths
            "font.size": 8.0 if size == WIDE else 9.0,
            "axes.labelpad": 10.0 if size == WIDE else 4.0,  # page.css enlarges its text on phones
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
        axes.xaxis.labelpad = 4.0
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
        data = "" if hover is None else f' data-chart="{escape(_told(axes, size, hover))}"'
    return _for_page(target.getvalue(), name, data)


def _told(axes: Axes, size: tuple[float, float], hover: Hover) -> str:
    """Return what page.js needs to turn places in the SVG into values, as JSON."""
    width, height = (72 * inches for inches in size)
    box = axes.get_position()
    return json.dumps(
        {
            "box": [box.x0 * width, (1 - box.y1) * height, box.x1 * width, (1 - box.y0) * height],
            "x": axes.get_xlim(),
            "y": axes.get_ylim(),
            "log": axes.get_yscale() == "log",
            "share": hover.as_share,
            "labels": hover.labels,
            "axis": hover.x_label,
            "zoom": hover.zoom,
        }
    )


def _for_page(svg: str, name: str, data: str) -> str:
    """Turn an SVG file into an element of the page, with unique ids and CSS variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = svg.replace("xlink:href", "href")
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None, "matplotlib writes a viewBox"
    svg = svg[svg.index(">") + 1 :]
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"\n\s*\n", "\n", svg)
    return f'<svg {view_box[0]} aria-hidden="true"{data}>{svg}'
