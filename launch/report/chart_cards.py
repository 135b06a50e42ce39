"""Puts each chart of report.html on a card with its title, last value and legend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape

from launch.report.chart_specs import CHARTS, LOSS, Chart, score_by_tokens, validation_charts
from launch.report.compared_runs import ComparedRuns
from launch.report.logged_run import LoggedRun, finite_number
from launch.report.shown_sizes import DROPS, SIDES, read_counts
from launch.report.size_charts import accuracy_chart, histogram_chart, side_of
from launch.report.svg_charts import CURVE_COLOURS, WIDE, line_chart, percent

_Legend = list[tuple[str, str, str]]
"""(Kind of mark, colour variable, label) of each entry."""


def chart_cards(runs: ComparedRuns) -> Iterator[str]:
    """Yield all cards of the page as HTML, in order."""
    yield chart_card(runs, LOSS, with_events=True)
    yield from _accuracy_cards(runs)
    for chart in (*validation_charts(*runs.runs), *CHARTS):
        yield chart_card(runs, chart)
    yield _histogram_card(runs, SIDES, "Image sizes", "side of the image, pixels")
    yield _histogram_card(runs, DROPS, "Dropped patches", "share of an image's patches, %")


def chart_card(runs: ComparedRuns, chart: Chart, *, with_events: bool = False) -> str:
    """Return the card of a chart; `with_events`: its legend explains the marks of events."""
    drawn, marks, labels, last = [], [], [], ""
    for number, run in enumerate(runs.runs):
        for place, (label, metric) in enumerate(chart.curves):
            series = run.series.get(metric)
            if series is not None and series.last is not None:
                last = last or f"last {chart.format_value(series.last)}"
                drawn.append(runs.curve(run, metric))
                marks.append(runs.mark(number, place))
                several = len(chart.curves) > 1
                labels.append(runs.curve_label(number, label, of_several=several))
    wide = chart.size == WIDE
    if not drawn:
        metrics = ", ".join(f"<code>{metric}</code>" for _, metric in chart.curves)
        why = (
            f"{metrics} not logged: {chart.absent}" if chart.absent else f"{metrics} not logged yet"
        )
        return card(chart.title, absent(why), wide=wide)
    events = list(runs.events())
    svg = line_chart(
        chart.name, drawn, format_value=chart.format_value, marks=marks, events=events,
        labels=labels, x_label=runs.axis_label, y_label=chart.y_label, size=chart.size,
        smooth=chart.smooth, include=chart.include, log=chart.log,
    )  # fmt: skip
    legend: _Legend = []
    if len(drawn) > 1 or runs.several:
        legend = [(*mark, label) for mark, label in zip(marks, labels, strict=True)]
    if with_events and any(len(each.restarts) for each in events):
        legend.append(("dashed", "--muted", "restart"))
    if with_events and any(len(each.checkpoints) for each in events):
        legend.append(("tick", "--muted", "checkpoint"))
    last = "" if runs.several else last
    return card(chart.title, svg, value=last, legend=legend, wide=wide)


def _accuracy_cards(runs: ComparedRuns) -> Iterator[str]:
    by_side = [run.accuracy_by("by_resolution") for run in runs.runs]
    by_tokens = [run.accuracy_by("by_tokens") or score_by_tokens(run, "top1") for run in runs.runs]
    trained = None if runs.several else _trained(runs.first)
    if any(by_side):
        yield _accuracy_card(runs, "resolution", by_side, "side of the image, pixels", trained)
    if any(by_tokens):
        yield _accuracy_card(runs, "tokens", by_tokens, "most patches of an image", None)
    if not any(by_side) and not any(by_tokens):
        hint = (
            "Not evaluated yet. To add it, type<br>"
            "<code>zeta eval EXPORT IMAGES --json &gt; RUN_DIR/eval.json</code>"
        )
        yield card("Top-1 by resolution", absent(hint), wide=True)


def _accuracy_card(
    runs: ComparedRuns,
    what: str,
    rows: Sequence[Sequence[tuple[str, float]]],
    x_label: str,
    trained: tuple[float, float] | None,
) -> str:
    legend: _Legend = []
    for number, of_run in enumerate(rows):
        if runs.several and of_run:
            legend.append(("line", CURVE_COLOURS[number], runs.labels[number]))
        for name, top1 in of_run:
            if side_of(name) is None:
                colour = CURVE_COLOURS[number] if runs.several else "--series-2"
                legend.append(("dashed", colour, f"{name} {percent(top1)}"))
    if trained:
        legend.append(("area", "--band", f"sizes of training: {trained[0]:g} to {trained[1]:g}"))
    names = runs.labels if runs.several else ["top-1"]
    svg = accuracy_chart(f"accuracy-{what}", rows, labels=names, trained=trained, x_label=x_label)
    best = f"best {percent(max(top1 for of_run in rows for _, top1 in of_run))}"
    return card(f"Top-1 by {what}", svg, value=best, legend=legend, wide=True)


def _histogram_card(runs: ComparedRuns, what: str, title: str, x_label: str) -> str:
    counts = [read_counts(run.sizes, what) for run in runs.runs]
    shown = [number for number, each in enumerate(counts) if each]
    if not shown:
        hint = "Unknown: <code>zeta report</code> could not read the run's shards"
        return card(title, absent(hint), wide=True)
    write: Callable[[float], str] = "{:g}".format
    svg = histogram_chart(what.replace("_", "-"), counts, x_label=x_label, format_value=write)
    legend = [("line", CURVE_COLOURS[number], runs.labels[number]) for number in shown]
    images = None if runs.several else finite_number(runs.first.sizes.get("images"))
    looked_at = f"of {images:,.0f} images" if images else ""
    return card(title, svg, value=looked_at, legend=legend if runs.several else [], wide=True)


def card(
    title: str,
    body: str,
    *,
    value: str = "",
    legend: Sequence[tuple[str, str, str]] = (),
    wide: bool,
) -> str:
    """Return a card; `legend` holds (kind of mark, colour variable, label)."""
    items = "".join(
        f'<span><i class="{kind}" style="color: var({colour})"></i>{escape(label)}</span>'
        for kind, colour, label in legend
    )
    caption = f'\n<p class="legend">{items}</p>' if items else ""
    return (
        f'<figure class="card{" wide" if wide else ""}">\n<header><h3>{escape(title)}</h3>'
        f"<span>{escape(value)}</span></header>{caption}\n{body}\n</figure>"
    )


def absent(hint: str) -> str:
    """Return the placeholder of a card that has no data; `hint` is HTML."""
    return f'<div class="absent"><div>{hint}</div></div>'


def _trained(run: LoggedRun) -> tuple[float, float] | None:
    """Return the smallest and largest side of training in pixels; None: not in the config."""
    if run.setting("data.resolution.kind") not in ("area", "side", "side_normal"):
        return None
    low, high = (finite_number(run.setting(f"data.resolution.{end}")) for end in ("min", "max"))
    return (low, high) if low is not None and high is not None else None
