"""Writes `report.html`, a page about one run or about several in comparison.

The page is one file that opens from disk: charts are inline SVG, the picture of a pack is a data
URI, and a content security policy forbids the browser to fetch anything and to run any script but
`page.js`, which it names by its hash. Everything that comes from files of the run is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np

from launch.filesystems import check_file
from launch.report.chart_cards import chart_cards
from launch.report.class_table import class_section
from launch.report.compared_runs import ComparedRuns
from launch.report.facts import facts_list
from launch.report.headlines import headlines, last_value
from launch.report.logged_run import LoggedRun, finite_number, read_run
from launch.report.tables import (
    config_section,
    headlines_table,
    notes_section,
    quarantine_section,
    starts_section,
)
from zeta import metric_names as names
from zeta.files import write_whole_text
from zeta.run.directory import RunDir

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{}'"
_HINT = "Point at a chart for its values; drag over it to zoom in, double-click to zoom out."


def write_report(
    run_dir: Path, out: Path | None = None, compare: Sequence[Path] = (), axis: str = "step"
) -> Path:
    """Write the report of a run and return its path.

    Args:
        run_dir: directory of a run, whether it is finished, running or dead. The report also shows
            `eval.json` (`zeta eval --json`), `result.json` (`zeta demo`), `pack.svg` and
            `sizes.json` (`launch.report.derived_files`) if they are there.
        out: file to write; by default `report.html` in the run directory.
        compare: directories of other runs, drawn into the same charts.
        axis: x-axis of the charts, one of `launch.report.axes.AXES`.

    Raises:
        ValueError: a directory is not that of a run, holds no metrics yet, or is given twice; or
            `out` cannot be written.
    """
    runs, target = check_report(run_dir, out, compare, axis)
    page = build_page(runs)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole_text(target, page, durable=False)
    return target


def check_report(
    run_dir: Path, out: Path | None = None, compare: Sequence[Path] = (), axis: str = "step"
) -> tuple[ComparedRuns, Path]:
    """Check the arguments of `write_report`; return the runs and the file to write.

    Nothing is written yet, so that mistakes show before the slow work.

    Raises:
        ValueError: a directory is not that of a run, holds no metrics yet, or is given twice; the
            axis is unknown; or the page cannot be written.
    """
    runs = ComparedRuns([read_run(Path(each)) for each in (run_dir, *compare)], axis)
    target = RunDir(Path(run_dir)).report if out is None else Path(out)
    check_file(target, "--out")
    return runs, target


def build_page(runs: ComparedRuns) -> str:
    """Return the page as HTML."""
    title = ", ".join(runs.labels)
    style, script = (
        files("launch.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js")
    )
    policy = _POLICY.format(base64.b64encode(sha256(script.encode()).digest()).decode())
    body = "\n".join(
        (
            *_header(runs, title),
            headlines_table(runs) if runs.several else _tiles(runs.first),
            "" if runs.several else facts_list(runs.first),
            f'<p class="note hover">{_HINT}</p>',
            '<section class="charts" aria-label="Charts">',
            *chart_cards(runs),
            "</section>",
            class_section(runs),
            *_pack_section(runs),
            starts_section(runs),
            quarantine_section(runs),
            config_section(runs),
            notes_section(runs),
        )
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)} - zeta run report</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def _header(runs: ComparedRuns, title: str) -> Iterator[str]:
    yield f'<header>\n<p class="kicker">zeta run report</p>\n<h1>{escape(title)}</h1>'
    for label, run in zip(runs.labels, runs.runs, strict=True):
        yield from _status(run, f"{escape(label)}: " if runs.several else "")
    yield "</header>"


def _status(run: LoggedRun, whose: str) -> Iterator[str]:
    """Yield the progress of a run, and warnings; `whose` is HTML."""
    limit = finite_number(run.setting("train.max_steps"))
    of_limit = f" of {limit:,.0f}" if limit else ""
    state = (
        f"<b>Finished</b> after {run.steps:,} steps."
        if run.finished
        else f'<b class="open">Not finished</b>: last metrics at step {run.steps:,}{of_limit}.'
    )
    yield f'<p class="status">{whose}{state}</p>'
    lost = run.series.get(names.TRAIN_LOSS)
    bad = int((~np.isfinite(lost.values)).sum()) if lost else 0
    skipped = last_value(run, names.SKIPPED_STEPS)
    if bad:
        yield f'<p class="warning">{whose}The loss is not finite at {bad:,} logged steps.</p>'
    if skipped:
        yield (
            f'<p class="warning">{whose}{skipped:,.0f} steps were skipped, because '
            "their gradients were not finite.</p>"
        )


def _tiles(run: LoggedRun) -> str:
    tiles = "\n".join(
        f'<div class="tile"><dt>{escape(label)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="hint">{escape(hint)}</dd></div>'
        for label, value, hint in headlines(run)
    )
    return f'<dl class="tiles">\n{tiles}\n</dl>'


def _pack_section(runs: ComparedRuns) -> Iterator[str]:
    for label, run in zip(runs.labels, runs.runs, strict=True):
        if run.pack is not None:
            media_type, content = run.pack
            data = base64.b64encode(content).decode()
            whose = f"{label}: a" if runs.several else "A"
            yield (
                f'<h2>{escape(whose)} pack as the model sees it</h2>\n<figure class="card">\n'
                '<img class="pack" alt="The images of a pack with their dropped patches, and '
                f'their token sequence" src="data:{media_type};base64,{data}">\n</figure>'
            )
