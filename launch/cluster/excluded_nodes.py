"""Note the nodes that a run found bad, and tell whether its job can run without them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path

from launch.slurm_queries import SlurmUnavailableError, ask_slurm


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
    try:
        least, listed = _least_nodes(job), _nodes_of(partition)
        left = len(listed - set(bad) - _avoided_nodes(job))
    except SlurmUnavailableError:
        return ""
    if least is None or not listed or left >= least:
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
        jobs = json.loads(ask_slurm("squeue", "--json", f"--jobs={job}"))["jobs"]
        asked = [entry["tres_req_str"] for entry in jobs if str(entry["job_id"]) == job]
        return int(re.findall(r"\bnode=(\d+)", asked[0])[0])
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def _nodes_of(partition: str) -> set[str]:
    shown = ask_slurm("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N")
    return set(shown.split())


def _avoided_nodes(job: str) -> set[str]:
    """Return the nodes that the job must not get already."""
    shown = ask_slurm("scontrol", "--oneliner", "show", "job", job)
    avoided = re.search(r" ExcNodeList=(\S+)", shown)
    if avoided is None or avoided[1] == "(null)":
        return set()
    return set(ask_slurm("scontrol", "show", "hostnames", avoided[1]).split())
