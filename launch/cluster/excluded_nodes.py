"""The nodes that a run has found bad, and whether its job can do without them."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

_SLURM_S = 30.0


def note_excluded(path: Path, bad: Mapping[str, str]) -> None:
    """Add nodes to the list: one a line, as name, time and reason.

    Args:
        path: `excluded_nodes` of a run directory; made if missing.
        bad: reason by node.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    lines = [f"{node} {now} {' '.join(reason.split())}\n" for node, reason in bad.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)


def too_few_left(environment: Mapping[str, str], bad: Mapping[str, str]) -> str:
    """Return why the job of this environment cannot run without `bad`; empty: it can.

    It is also empty where Slurm cannot be asked, as in most containers: the job then waits.
    """
    job, partition = environment.get("SLURM_JOB_ID"), environment.get("SLURM_JOB_PARTITION")
    if job is None or partition is None:
        return ""
    shown = _ask("scontrol", "--oneliner", "show", "job", job)
    avoided = re.search(r" ExcNodeList=(\S+)", shown)
    listed = _ask("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N")
    least = _least_nodes(job)
    if least is None or not avoided or not listed:
        return ""
    before = avoided[1] if avoided[1] != "(null)" else ""
    without = {*bad, *(_ask("scontrol", "show", "hostnames", before).split() if before else ())}
    left = len(set(listed.split()) - without)
    if left >= least:
        return ""
    return (
        f"without them partition {partition} has {left} node{'' if left == 1 else 's'}, and this "
        f"job needs {least}: put them right, or submit it with fewer --nodes"
    )


def _least_nodes(job: str) -> int | None:
    """Return the fewest nodes that a job asked for.

    Of a job that runs, its record tells the nodes that it has; what it asked for is in its TRES.
    """
    try:
        jobs = json.loads(_ask("squeue", "--json", f"--jobs={job}"))["jobs"]
        asked = [entry["tres_req_str"] for entry in jobs if str(entry["job_id"]) == job]
        return int(re.findall(r"\bnode=(\d+)", asked[0])[0])
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def _ask(*command: str) -> str:
    """Return what a Slurm command prints; empty where it cannot be asked."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_SLURM_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
