"""Tells what a run is: when and where it ran, of which code, how large its model and its steps.

Facts that a run directory does not hold, because an older version made it, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from html import escape
from typing import Any

from launch.report.compared_runs import ComparedRuns
from launch.report.headlines import last_value
from launch.report.logged_run import LoggedRun, finite_number
from launch.report.svg_charts import compact
from zeta import metric_names as names

_MOST_HOSTS = 4
"""Most hosts that are named."""


def facts(run: LoggedRun) -> Iterator[tuple[str, str]]:
    """Yield (label, text) of each fact of a run that is known, from its last start."""
    times = [text for start in run.starts if (text := started(start))]
    if times:
        yield "Date", times[0] if times[0] == times[-1] else f"{times[0]}, last start {times[-1]}"
    start = run.starts[-1] if run.starts else {}
    yield from _known("Host", hosts(start))
    yield from _known("Device", devices(start))
    yield from _known("Commit", commit(start.get("code")) or _commit_of_diff(run.code_line))
    parameters = finite_number(start.get("parameters"))
    if parameters is not None:
        short = f" ({compact(parameters)})" if parameters >= 1e5 else ""
        yield "Parameters", f"{parameters:,.0f}{short}"
    a_step = [
        f"{total / run.steps:,.0f} {unit}"
        for unit, metric in (("images", names.IMAGES_SEEN), ("tokens", names.TOKENS_SEEN))
        if run.steps and (total := last_value(run, metric))
    ]
    if a_step:
        yield "Batch size", f"{', '.join(a_step)} a step on average"


def facts_list(run: LoggedRun) -> str:
    """Return the facts of a run as an HTML list; empty if none is known."""
    items = "\n".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(text)}</dd></div>" for label, text in facts(run)
    )
    return f'<dl class="facts">\n{items}\n</dl>' if items else ""


def facts_rows(runs: ComparedRuns) -> list[list[str]]:
    """Return a row of each fact that is known of a run: its label, and its text of every run."""
    of_runs = [dict(facts(run)) for run in runs.runs]
    labels = dict.fromkeys(label for known in of_runs for label in known)
    return [[label, *(known.get(label, "\u2013") for known in of_runs)] for label in labels]


def started(start: Mapping[str, Any]) -> str:
    """Return the time of a start to the minute in UTC, or its text if it is none; or nothing."""
    text = start.get("time")
    if not isinstance(text, str):
        return ""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return text
    if time.tzinfo is None:
        return f"{time:%Y-%m-%d %H:%M}"
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def hosts(start: Mapping[str, Any]) -> str:
    """Return the names of a start's hosts, of many only the first; or nothing."""
    found = start.get("hosts")
    named = [str(host) for host in found] if isinstance(found, list) else []
    if len(named) <= _MOST_HOSTS:
        return ", ".join(named)
    return f"{len(named)} hosts: {', '.join(named[:_MOST_HOSTS])}, ..."


def devices(start: Mapping[str, Any]) -> str:
    """Return the devices of a start, each with its number of ranks; or nothing."""
    found = start.get("devices")
    counts = found.items() if isinstance(found, Mapping) else ()
    return ", ".join(
        f"{device} ({count} rank{'' if count == 1 else 's'})" for device, count in counts
    )


def commit(code: Any) -> str:
    """Return the short commit of a code version (`zeta.run.code_version`); or nothing."""
    found = code.get("commit") if isinstance(code, Mapping) else None
    if not isinstance(found, str):
        return ""
    return found[:12] + (", with changes" if code.get("dirty") else "")


def _commit_of_diff(line: str) -> str:
    match = re.fullmatch(r"zeta .*, commit ([0-9a-f]{7,64}), (.*)", line)
    if match is None:
        return ""
    return match[1][:12] + (", with changes" if match[2] == "with changes" else "")


def _known(label: str, text: str) -> Iterator[tuple[str, str]]:
    if text:
        yield label, text
