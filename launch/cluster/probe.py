"""Ask a cluster for its partitions, and whether it would take a job that is not submitted."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from launch.cluster.slurm import Job, submission_environment
from launch.slurm_queries import ask_slurm, run_slurm, slurm_messages

_COLUMNS = "%P|%D|%T|%G"
"""Columns of sinfo: partition, number of nodes, their state, their generic resources (GPUs)."""
_TAKES_JOBS = frozenset({"idle", "mixed", "allocated", "completing", "planned", "reserved"})


@dataclass(frozen=True)
class Partition:
    """A partition of a cluster, as sinfo lists it."""

    name: str
    is_default: bool
    nodes: int
    usable: int
    """Nodes that run jobs or are free for one."""
    idle: int
    gpus_per_node: int
    """GPUs of the nodes that have the most."""


def partitions() -> list[Partition]:
    """Ask the cluster for its partitions.

    Raises:
        SlurmUnavailableError: sinfo is missing, failed or did not answer.
    """
    return parse_partitions(_ask("sinfo", "--noheader", f"--format={_COLUMNS}"))


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
        Whether it would, and Slurm's message: when and where the job would start, or why not.

    Raises:
        SlurmUnavailableError: sbatch is missing or did not answer.
    """
    sbatch, *words = job.command
    environment = submission_environment(os.environ)
    done = run_slurm([sbatch, "--test-only", *words], environment=environment)
    return done.returncode == 0, "; ".join(slurm_messages(done.stderr))


def srun_knows(option: str) -> bool:
    """Return whether srun has an option, such as one of a plugin.

    Raises:
        SlurmUnavailableError: srun is missing, failed or did not answer.
    """
    return option in _ask("srun", "--help")


def _ask(*command: str) -> str:
    return ask_slurm(*command, environment=submission_environment(os.environ))
