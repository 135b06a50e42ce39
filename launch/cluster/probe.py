"""What a cluster says of itself, and of a job that is not submitted."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from launch.cluster.slurm import Job, said_by_slurm, submission_environment

_TIMEOUT_S = 30.0
_COLUMNS = "%P|%D|%T|%G"
"""Partition, nodes, their state, what they have besides cores."""
_TAKES_JOBS = frozenset({"idle", "mixed", "allocated", "completing", "planned", "reserved"})


@dataclass(frozen=True)
class Partition:
    """Some nodes of a cluster."""

    name: str
    is_default: bool
    nodes: int
    usable: int
    """Nodes that run jobs, or could."""
    idle: int
    gpus_per_node: int
    """Of the nodes with most of them."""


class SlurmSilentError(Exception):
    """A Slurm command is missing, failed or gave no answer; says which and why."""


def partitions() -> list[Partition]:
    """Ask the cluster for its partitions.

    Raises:
        SlurmSilentError: there is no sinfo, or no answer.
    """
    return parse_partitions(_ask(["sinfo", "--noheader", f"--format={_COLUMNS}"]).stdout)


def parse_partitions(text: str) -> list[Partition]:
    """Read the lines of `sinfo`: one for each partition, state and kind of node."""
    found: dict[str, Partition] = {}
    for line in filter(None, text.splitlines()):
        name, count, state, extras = line.split("|", 3)
        nodes, is_default = int(count), name.endswith("*")
        name = name.removesuffix("*")
        # Letters, then signs: "*" not responding, "~" powered off, "$" reserved for maintenance ...
        word = re.match("[a-z]*", state.lower())
        plain = word[0] if word else ""
        takes_jobs = plain in _TAKES_JOBS and not state.endswith("*")
        gpus = sum(int(match) for match in re.findall(r"\bgpu(?::[^:(,]+)?:(\d+)", extras))
        before = found.get(name, Partition(name, is_default, 0, 0, 0, 0))
        found[name] = Partition(
            name,
            is_default,
            before.nodes + nodes,
            before.usable + nodes * takes_jobs,
            before.idle + nodes * (takes_jobs and plain == "idle"),
            max(before.gpus_per_node, gpus),
        )
    return list(found.values())


def chances(job: Job) -> tuple[bool, str]:
    """Ask Slurm whether it would take a job, without submitting it.

    Returns:
        (taken, what Slurm says: when and where it would start, or why not).

    Raises:
        SlurmSilentError: there is no sbatch, or no answer.
    """
    sbatch, *words = job.command
    done = _ask([sbatch, "--test-only", *words], may_fail=True)
    return done.returncode == 0, "; ".join(said_by_slurm(done.stderr))


def srun_knows(option: str) -> bool:
    """Tell whether srun has an option, such as one of a plugin.

    Raises:
        SlurmSilentError: there is no srun, or no answer.
    """
    return option in _ask(["srun", "--help"]).stdout


def _ask(command: Sequence[str], *, may_fail: bool = False) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(
            command,
            env=submission_environment(os.environ),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except FileNotFoundError:
        raise SlurmSilentError(f"{command[0]} is not on PATH") from None
    except subprocess.TimeoutExpired:
        raise SlurmSilentError(f"{command[0]} gave no answer in {_TIMEOUT_S:g} s") from None
    if done.returncode != 0 and not may_fail:
        words = "; ".join(said_by_slurm(done.stderr)) or f"ended with {done.returncode}"
        raise SlurmSilentError(f"{command[0]}: {words}")
    return done
