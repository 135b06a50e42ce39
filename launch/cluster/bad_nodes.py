"""Decide from node reports which nodes to exclude, or that the job itself is at fault.

Pure: reports in, verdict out. A fault that one node finds and others do not is a fault of that
node; a fault that all of them find is a fault of the job, and no other node would help.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from launch.cluster.node_checks import ON_ONE_MACHINE

MOST_CLOCK_SKEW_S = 30.0


@dataclass(frozen=True)
class NodeReport:
    """The findings of one node; every field can be written as JSON."""

    node: str
    faults: list[str] = field(default_factory=list)
    gpus: list[str] = field(default_factory=list)
    """Names of the GPUs that it sees."""
    fingerprint: str = ""
    """Fingerprint of the shards that it sees; empty: it sees none, which is among the faults."""
    clock: float | None = None
    """Seconds since 1970 when all nodes were asked to read their clocks; None: it came later."""
    sees_run_dir: bool = True
    """Whether it sees what the first node has written into the run directory."""
    run_dir_kind: str = ""
    """Kind of file system that the run directory has there."""


@dataclass(frozen=True)
class Verdict:
    """The decision about the job."""

    bad: Mapping[str, str] = field(default_factory=dict)
    """Reason by bad node: the job may continue without them."""
    refusal: str = ""
    """Why it must not continue on any nodes; empty: it may."""


def judge(reports: Sequence[NodeReport | None], nodes: Sequence[str], waited_s: float) -> Verdict:
    """Judge the nodes by their reports.

    Args:
        reports: one for each node, the first node's first; None: it sent none.
        nodes: their names, in the same order.
        waited_s: seconds for which reports were waited for.
    """
    faults: dict[str, list[str]] = {node: [] for node in nodes}
    here = [report for report in reports if report is not None]
    for node, report in zip(nodes, reports, strict=True):
        if report is None:
            faults[node].append(f"no report from it in {waited_s:g} s")
        else:
            faults[node] += report.faults
    first = reports[0]
    blind = [report.node for report in here if not report.sees_run_dir]
    if blind and (first is None or first.run_dir_kind in ON_ONE_MACHINE):
        kind = "" if first is None else f" ({first.run_dir_kind})"
        return Verdict(
            refusal=f"run.dir lies on a disk of {nodes[0]} alone{kind}: {', '.join(blind)} cannot "
            "see what is written there; choose a run.dir on storage that every node sees"
        )
    for node in blind:
        faults[node].append(f"run.dir: what {nodes[0]} writes there cannot be seen")
    for report in here:
        faults[report.node] += _odd_ones(report, here)
    bad = {node: "; ".join(found) for node, found in faults.items() if found}
    if len(bad) == len(nodes):
        return Verdict(bad, refusal=f"no node can train: {grouped(bad)}")
    return Verdict(bad)


def _odd_ones(report: NodeReport, reports: Sequence[NodeReport]) -> list[str]:
    """Return what this node sees differently from most nodes."""
    odd = []
    usual = _most_common(tuple(r.fingerprint for r in reports if r.fingerprint))
    if report.fingerprint and report.fingerprint != usual:
        odd.append("data.shards: it sees other shards, or other times of change, than most nodes")
    gpus = _most_common(tuple(str(len(r.gpus)) for r in reports))
    if len(report.gpus) < int(gpus or 0):
        odd.append(f"{len(report.gpus)} GPUs, where most nodes have {gpus}")
    clocks = [r.clock for r in reports if r.clock is not None]
    if report.clock is not None and abs(skew := report.clock - median(clocks)) > MOST_CLOCK_SKEW_S:
        odd.append(f"its clock is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}")
    return odd


def _most_common(values: Sequence[str]) -> str | None:
    """Return the value that most have; of several, the one that was first."""
    return Counter(values).most_common(1)[0][0] if values else None


def silent_nodes(answers: Sequence[str | None], nodes: Sequence[str]) -> dict[str, str]:
    """Return the nodes that are to blame for an all-reduce that failed, and why.

    Args:
        answers: for each node, what went wrong there; None: it did not answer.
        nodes: their names, in the same order.
    """
    return {
        node: "no answer from it in the all-reduce of the nodes"
        for node, answer in zip(nodes, answers, strict=True)
        if answer is None
    }


def grouped(reasons: Mapping[str, str]) -> str:
    """Return the reasons as text, each once with all nodes that share it.

    Args:
        reasons: by node.
    """
    by_reason: dict[str, list[str]] = {}
    for node, reason in reasons.items():
        by_reason.setdefault(reason, []).append(node)
    return "; ".join(f"{', '.join(nodes)}: {reason}" for reason, nodes in by_reason.items())
