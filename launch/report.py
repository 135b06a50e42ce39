"""`report.html`: what a run did, on one page that opens from disk.

The page is self-contained: charts are inline SVG, the picture of a pack is a data URI, there is no
script, and a content security policy forbids the browser to fetch anything. Everything that comes
from files of the run is escaped.
"""

from __future__ import annotations

import base64
import os
from collections import Counter
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np

from launch.charts import CHARTS, LOSS, Chart, validation_charts
from launch.figures import WIDE, accuracy_chart, curve_mark, line_chart, percent, side_of
from launch.headlines import headlines, last_value
from launch.run_record import RunRecord, finite_number, read_run
from zeta import metric_names as names
from zeta.run_dir import RunDir

MAX_QUARANTINE_ROWS = 50
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run and return its path.

    Args:
        run_dir: a run directory; the run may be finished, going on or dead. Besides its own files,
            `eval.json` (`zeta eval --json`), `result.json` (`zeta demo`) and `pack.svg`
            (`launch.pack_picture`) are shown when they lie there.
        out: the file to write; `report.html` in the run directory unless given.

    Raises:
        ValueError: `run_dir` is not a run directory or holds no metrics yet, or `out` is a folder.
    """
    page = build_page(read_run(Path(run_dir)))
    target = RunDir(Path(run_dir)).report if out is None else Path(out)
    if target.is_dir():
        raise ValueError(
            f"{target} is a folder; give the file to write, as in {target}/report.html"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(target)
    return target


def build_page(run: RunRecord) -> str:
    """Return the page."""
    title = str(run.setting("run.name") or run.path.resolve().name)
    style = files("launch").joinpath("report.css").read_text(encoding="utf-8")
    body = "\n".join(
        (
            _header(run, title),
            _tiles(run),
            '<section class="charts" aria-label="Charts">',
            _chart_card(run, LOSS),
            _accuracy_card(run),
            *(_chart_card(run, chart) for chart in (*validation_charts(run), *CHARTS)),
            "</section>",
            _pack_section(run),
            _quarantine_section(run),
            _config_section(run),
            _notes_section(run),
        )
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)} - zeta run report</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _header(run: RunRecord, title: str) -> str:
    limit = finite_number(run.setting("train.max_steps"))
    of_limit = f" of {limit:,.0f}" if limit else ""
    state = (
        f"<b>Finished</b> after {run.steps:,} steps."
        if run.finished
        else f'<b class="open">Not finished</b>: last metrics at step {run.steps:,}{of_limit}.'
    )
    parts = [
        f'<header>\n<p class="kicker">zeta run report</p>\n<h1>{escape(title)}</h1>',
        f'<p class="status">{state}</p>',
    ]
    lost = run.series.get(names.TRAIN_LOSS)
    bad = int((~np.isfinite(lost.values)).sum()) if lost else 0
    skipped = last_value(run, names.SKIPPED_STEPS)
    if bad:
        parts.append(f'<p class="warning">The loss is not finite at {bad:,} logged steps.</p>')
    if skipped:
        parts.append(
            f'<p class="warning">{skipped:,.0f} steps were skipped (gradients not finite).</p>'
        )
    return "\n".join([*parts, "</header>"])


def _tiles(run: RunRecord) -> str:
    tiles = "\n".join(
        f'<div class="tile"><dt>{escape(label)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="hint">{escape(hint)}</dd></div>'
        for label, value, hint in headlines(run)
    )
    return f'<dl class="tiles">\n{tiles}\n</dl>'


def _chart_card(run: RunRecord, chart: Chart) -> str:
    drawn = [
        (label, run.series[metric])
        for label, metric in chart.curves
        if metric in run.series and run.series[metric].last is not None
    ]
    wide = chart.size == WIDE
    if not drawn:
        missing = ", ".join(f"<code>{metric}</code>" for _, metric in chart.curves)
        return _card(chart.title, _absent(f"No value of {missing} yet"), wide=wide)
    svg = line_chart(
        chart.name, [series for _, series in drawn], format_value=chart.format_value,
        size=chart.size, smooth=chart.smooth, include=chart.include, log=chart.log,
    )  # fmt: skip
    labels = [label for label, _ in drawn] if len(drawn) > 1 else []
    legend = [(*curve_mark(index), label) for index, label in enumerate(labels)]
    last = f"last {chart.format_value(drawn[0][1].last or 0.0)}"
    return _card(chart.title, svg, value=last, legend=legend, wide=wide)


def _accuracy_card(run: RunRecord) -> str:
    title, rows, trained = (
        "Top-1 by resolution",
        run.accuracy_by_resolution,
        _trained(run),
    )
    if not rows:
        hint = (
            "No <code>by_resolution</code> in <code>eval.json</code>:<br>"
            "<code>zeta eval EXPORT SHARDS --json &gt; RUN_DIR/eval.json</code> writes it"
        )
        return _card(title, _absent(hint), wide=True)
    legend = [
        ("dashed", "--series-2", f"{name} {percent(top1)}")
        for name, top1 in rows
        if side_of(name) is None
    ]
    if trained:
        legend.append(("area", "--band", f"trained at {trained[0]:g} to {trained[1]:g}"))
    svg = accuracy_chart("accuracy", rows, trained=trained)
    best = f"best {percent(max(top1 for _, top1 in rows))}"
    return _card(title, svg, value=best, legend=legend, wide=True)


def _card(
    title: str,
    body: str,
    *,
    value: str = "",
    legend: Sequence[tuple[str, str, str]] = (),
    wide: bool,
) -> str:
    """Return a figure; `legend` holds (kind of mark, colour variable, label)."""
    items = "".join(
        f'<span><i class="{kind}" style="color: var({colour})"></i>{escape(label)}</span>'
        for kind, colour, label in legend
    )
    caption = f'\n<p class="legend">{items}</p>' if items else ""
    return (
        f'<figure class="card{" wide" if wide else ""}">\n<header><h3>{escape(title)}</h3>'
        f"<span>{escape(value)}</span></header>{caption}\n{body}\n</figure>"
    )


def _absent(hint: str) -> str:
    return f'<div class="absent"><div>{hint}</div></div>'


def _pack_section(run: RunRecord) -> str:
    if run.pack is None:
        return ""
    media_type, content = run.pack
    data = base64.b64encode(content).decode()
    return (
        '<h2>One pack, as the model saw it</h2>\n<figure class="card">\n'
        f'<img class="pack" alt="The images of one pack with their dropped patches, and the token '
        f'sequence they make" src="data:{media_type};base64,{data}">\n</figure>'
    )


def _quarantine_section(run: RunRecord) -> str:
    if not run.quarantine:
        return ""
    reasons = Counter(str(row.get("reason", "unknown")) for row in run.quarantine)
    counts = "\n".join(
        f'<tr><td class="number">{count:,}</td><td>{escape(reason)}</td></tr>'
        for reason, count in reasons.most_common(MAX_QUARANTINE_ROWS)
    )
    shown = run.quarantine[:MAX_QUARANTINE_ROWS]
    rows = "\n".join(
        "<tr>"
        + "".join(f"<td>{escape(str(row.get(key, '')))}</td>" for key in ("key", "shard", "reason"))
        + "</tr>"
        for row in shown
    )
    more = len(run.quarantine) - len(shown)
    rest = f'<p class="note">{more:,} more in quarantine.jsonl.</p>' if more else ""
    total = f"{len(run.quarantine):,} image{'s' if len(run.quarantine) > 1 else ''}"
    return f"""<h2>Quarantine: {total} could not be used</h2>
<table><thead><tr><th>Images</th><th>Reason</th></tr></thead>
<tbody>
{counts}
</tbody></table>
<details><summary>Which images</summary>
<table><thead><tr><th>Key</th><th>Shard</th><th>Reason</th></tr></thead>
<tbody>
{rows}
</tbody></table>
{rest}</details>"""


def _config_section(run: RunRecord) -> str:
    if not run.config_text:
        return ""
    return (
        "<h2>Config</h2>\n<details><summary>config.yaml, as resolved at the start</summary>\n"
        f"<pre>{escape(run.config_text)}</pre></details>"
    )


def _notes_section(run: RunRecord) -> str:
    if not run.notes:
        return ""
    items = "\n".join(f"<li>{escape(note)}</li>" for note in run.notes)
    return f'<h2>Not shown</h2>\n<ul class="note">\n{items}\n</ul>'


def _trained(run: RunRecord) -> tuple[float, float] | None:
    """Return the sides in pixels that training drew from, where the config tells both ends."""
    if run.setting("data.resolution.kind") not in ("area", "side", "side_normal"):
        return None
    low, high = (finite_number(run.setting(f"data.resolution.{end}")) for end in ("min", "max"))
    return (low, high) if low is not None and high is not None else None
