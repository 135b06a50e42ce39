"""Builds the tables of report.html: headline numbers, starts, quarantine and settings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from launch.report.compared_runs import ComparedRuns
from launch.report.facts import commit, devices, facts_rows, hosts, started
from launch.report.headlines import headlines
from launch.report.logged_run import LoggedRun

MAX_QUARANTINE_ROWS = 50
_STARTS = ("Time", "From step", "Ranks", "Hosts", "Devices", "Commit")
_NONE = "\u2013"


def headlines_table(runs: ComparedRuns) -> str:
    """Return the headline numbers and facts of several runs side by side."""
    columns = [list(headlines(run, runs.steps_averaged)) for run in runs.runs]
    rows = [
        [label, *(f"{column[place][1]}" for column in columns)]
        for place, (label, _, _) in enumerate(columns[0])
    ]
    return _table(["", *runs.labels], rows + facts_rows(runs))


def starts_section(runs: ComparedRuns) -> str:
    """Return the starts of each run that was started more than once."""
    parts = []
    for label, run in zip(runs.labels, runs.runs, strict=True):
        if len(run.starts) > 1:
            whose = f"{label}: started" if runs.several else "Started"
            rows = [
                [
                    started(start) or _NONE,
                    *(f"{start.get(key, _NONE)}" for key in ("step", "ranks")),
                    *(text or _NONE for text in (hosts(start), devices(start))),
                    commit(start.get("code")) or _NONE,
                ]
                for start in run.starts
            ]
            parts.append(f"<h2>{escape(whose)} {len(run.starts)} times</h2>")
            parts.append(_table(_STARTS, rows))
    return "\n".join(parts)


def quarantine_section(runs: ComparedRuns) -> str:
    """Return the images that each run could not use, and why."""
    return "\n".join(
        _quarantine(f"Quarantine of {label}" if runs.several else "Quarantine", run)
        for label, run in zip(runs.labels, runs.runs, strict=True)
        if run.quarantine
    )


def _quarantine(title: str, run: LoggedRun) -> str:
    reasons = Counter(str(row.get("reason", "unknown")) for row in run.quarantine)
    counts = [[f"{count:,}", why] for why, count in reasons.most_common(MAX_QUARANTINE_ROWS)]
    shown = run.quarantine[:MAX_QUARANTINE_ROWS]
    rows = [[str(row.get(key, "")) for key in ("key", "shard", "reason")] for row in shown]
    more = len(run.quarantine) - len(shown)
    rest = f'<p class="note">{more:,} more in quarantine.jsonl.</p>' if more else ""
    total = f"{len(run.quarantine):,} image{'s' if len(run.quarantine) > 1 else ''}"
    return (
        f"<h2>{escape(title)}: {total} could not be used</h2>\n"
        f"{_table(['Images', 'Reason'], counts)}\n<details><summary>List of images</summary>\n"
        f"{_table(['Key', 'Shard', 'Reason'], rows)}\n{rest}</details>"
    )


def config_section(runs: ComparedRuns) -> str:
    """Return the settings in which the runs differ, and the whole config of each."""
    parts = []
    if runs.several:
        changed = list(config_changes([run.config for run in runs.runs]))
        rows = [[key, *map(_say, values)] for key, values in changed]
        parts.append(f"<h2>Settings that differ: {len(rows)}</h2>")
        parts.append(_table(["Setting", *runs.labels], rows) if rows else "")
    texts = [(label, run.config_text) for label, run in zip(runs.labels, runs.runs, strict=True)]
    if any(text for _, text in texts):
        parts.append("<h2>Config</h2>")
    parts += [
        "<details><summary>config.yaml, with all defaults filled in"
        f"{escape(f' of {label}') if runs.several else ''}</summary>\n"
        f"<pre>{escape(text)}</pre></details>"
        for label, text in texts
        if text
    ]
    return "\n".join(parts)


def config_changes(
    configs: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, list[Any]]]:
    """Yield (dotted key, values in all configs) where they differ; None: not in that config."""
    flat = [dict(_leaves(config, "")) for config in configs]
    for key in dict.fromkeys(key for each in flat for key in each):
        values = [each.get(key) for each in flat]
        if any(value != values[0] for value in values):
            yield key, values


def notes_section(runs: ComparedRuns) -> str:
    """Return the notes about what is missing or could not be read."""
    notes = [
        f"{label}: {note}" if runs.several else note
        for label, run in zip(runs.labels, runs.runs, strict=True)
        for note in run.notes
    ]
    if not notes:
        return ""
    items = "\n".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<h2>Missing from this report</h2>\n<ul class="note">\n{items}\n</ul>'


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _say(value: Any) -> str:
    if value is None:
        return _NONE
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{titles}</tr></thead>\n<tbody>\n{lines}\n'
        "</tbody></table></div>"
    )
