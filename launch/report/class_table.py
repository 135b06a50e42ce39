"""Builds the table of accuracy by class, from the `per_class` of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from launch.report.compared_runs import ComparedRuns
from launch.report.logged_run import LoggedRun, finite_number
from launch.report.svg_charts import CURVE_COLOURS

MAX_CLASSES = 2000
"""Most classes in the table."""
_SHOWN_AT_ONCE = 20


def class_section(runs: ComparedRuns) -> str:
    """Return top-1 of each class in every run, the lowest first; empty without an evaluation."""
    of_runs = [_scores(run) for run in runs.runs]
    classes = {name: images for scores in of_runs for name, (_, images) in scores.items()}
    if not classes:
        return ""

    def lowest(name: str) -> float:
        return min(scores[name][0] for scores in of_runs if name in scores)

    ordered = sorted(classes, key=lowest)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>{_number(classes[name])}'
        + "".join(_bar(scores.get(name), number) for number, scores in enumerate(of_runs))
        + "</tr>"
        for name in ordered[:MAX_CLASSES]
    )
    titles = runs.labels if runs.several else ["Top-1"]
    head = "".join(f"<th>{escape(title)}</th>" for title in ("Class", "Images", *titles))
    more = len(ordered) - MAX_CLASSES
    rest = f'<p class="note">{more:,} more in eval.json.</p>' if more > 0 else ""
    counted = f"{len(ordered):,} class{'' if len(ordered) == 1 else 'es'}"
    return (
        "<h2>Top-1 by class, lowest first</h2>\n"
        f"<details{' open' if len(ordered) <= _SHOWN_AT_ONCE else ''}>"
        f"<summary>{counted}</summary>\n"
        f'<div class="scroll classes"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n'
        f"</tbody></table></div>\n{rest}</details>"
    )


def _scores(run: LoggedRun) -> dict[str, tuple[float, float | None]]:
    """Return (top-1, images) by class; entries without a top-1 are left out."""
    table = run.evaluation.get("per_class")
    found = {}
    for name, row in table.items() if isinstance(table, Mapping) else ():
        top1 = finite_number(row.get("top1")) if isinstance(row, Mapping) else None
        if top1 is not None:
            found[str(name)] = (top1, finite_number(row.get("images")))
    return found


def _number(value: float | None) -> str:
    return f"<td>{'' if value is None else f'{value:,.0f}'}</td>"


def _bar(score: tuple[float, float | None] | None, run: int) -> str:
    """Return a cell with a share as a bar and in per cent."""
    if score is None:
        return "<td>\u2013</td>"
    share = min(1.0, max(0.0, score[0]))
    style = f"width: {70 * share:.1f}%; background: var({CURVE_COLOURS[run]})"
    return f'<td class="share"><i style="{style}"></i>{100 * score[0]:.1f}%</td>'
