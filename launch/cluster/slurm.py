"""Submit slurm/pretrain.sbatch with arguments that no shell interprets.

The script is submitted as it is shipped, followed by CONFIG and settings, which are the same for
each start of the job; everything else is a flag of sbatch.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.config.cluster import ClusterConfig, node_range, seconds_of
from launch.config.destinations import run_directory
from launch.config.load import ZetaConfig
from launch.shipped import slurm_root
from launch.slurm_queries import (
    SlurmMissingError,
    SlurmUnavailableError,
    run_slurm,
    slurm_messages,
)
from zeta.config_field import AUTO
from zeta.exit_codes import RunError
from zeta.run.directory import RunDir

_SBATCH_TIMEOUT_S = 120.0
_FLAGS = {
    "partition": "--partition",
    "account": "--account",
    "qos": "--qos",
    "time": "--time",
    "nodes": "--nodes",
    "cpus_per_task": "--cpus-per-task",
    "mem": "--mem",
    "constraint": "--constraint",
    "exclude": "--exclude",
}
_ABOUT_THE_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS")
_DIGITS_OF_RUN_DIR = 6
_SHORT_JOB_S = 20 * 60


@dataclass(frozen=True)
class Job:
    """A job that can be submitted."""

    command: tuple[str, ...]
    """sbatch and its arguments."""
    run_dir: RunDir
    """The run directory, with an absolute path."""

    def log(self, job_id: int) -> Path:
        """Return the log of one submission, which all starts of the job share."""
        return self.run_dir.logs / f"slurm-{job_id}.log"


class NotSubmittedError(RunError):
    """No job was submitted: Slurm refused it, or could not be reached."""


def ranks_per_node(config: ZetaConfig) -> int:
    """Return the number of ranks of a node: one for each GPU, or the tasks asked for on CPUs.

    Raises:
        ValueError: the config does not set it, or sets it in two ways.
    """
    cluster, device = config.cluster, config.train.device
    if device == "cpu":
        if cluster.gpus_per_node is not None:
            raise ValueError(
                f"cluster.gpus_per_node is {cluster.gpus_per_node}, but train.device is cpu: leave "
                "it out, or train on GPUs with --cluster gpu"
            )
        return cluster.tasks_per_node or 1
    if cluster.gpus_per_node is None:
        raise ValueError(
            "cluster.gpus_per_node is not set; give --gpus-per-node G, or train on CPUs with "
            "--cluster cpu"
        )
    if cluster.tasks_per_node not in (None, cluster.gpus_per_node):
        raise ValueError(
            f"cluster.tasks_per_node is {cluster.tasks_per_node}, but each of the "
            f"{cluster.gpus_per_node} GPUs of a node has one rank: leave it out"
        )
    return cluster.gpus_per_node


def most_ranks(config: ZetaConfig) -> int:
    """Return the largest world size that the job can start with.

    Raises:
        ValueError: the config sets no nodes or ranks.
    """
    if config.cluster.nodes is None:
        raise ValueError("cluster.nodes is not set; give --nodes N, or --nodes MIN-MAX")
    return node_range(config.cluster.nodes)[1] * ranks_per_node(config)


def cores_warning(config: ZetaConfig) -> str | None:
    """Return a message if a rank and its loader workers may get one core; else None.

    Without a request, Slurm gives a task one core, unless the site has set another number.
    """
    workers = config.data.workers
    if config.cluster.cpus_per_task is not None or not workers:
        return None
    if workers == AUTO:
        what, cores = "its loader workers, as many as it has cores,", "C"
    else:
        what, cores = f"its {workers} loader workers", f"{workers + 1} or more"
    return (
        f"cluster.cpus_per_task is not set, so that a rank and {what} may have to share one core: "
        f"give --cpus-per-task {cores}, unless the site gives more cores by itself"
    )


def job_for(config: ZetaConfig, arguments: Sequence[str], *, chained: bool = False) -> Job:
    """Return the job of a run.

    Args:
        config: of the run.
        arguments: CONFIG and settings, as the script gets them.
        chained: one of several jobs that run one after another and are never requeued.

    Raises:
        ValueError: the config sets no nodes or ranks, or Slurm cannot write into such a run
            directory.
    """
    cluster, run_dir = config.cluster, absolute_run_dir(config)
    if "\\" in str(run_dir.path):
        raise ValueError(
            f"run.dir is {run_dir.path}; Slurm takes a backslash in the name of a log for a sign "
            "of its own: choose another run.dir"
        )
    log = str(run_dir.logs).replace("%", "%%") + "/slurm-%j.log"
    name = re.sub(r"[^\w.+-]", "_", config.run.name, flags=re.ASCII)
    ranks = ranks_per_node(config)
    exported, tasks = _tasks_per_node(cluster, ranks)
    words = [tasks]
    if config.train.device != "cpu":
        words.append(f"--gpus-per-node={ranks}")
    for field, flag in _FLAGS.items():
        value = getattr(cluster, field)
        if value is not None:
            words.append(f"{flag}={value}")
    limit = None if cluster.time is None else seconds_of(cluster.time)
    if limit is not None and limit < _SHORT_JOB_S:
        # The script's own five minutes would be most of this job, or more than all of it.
        words.append(f"--signal=USR1@{max(1, limit // 4)}")
    if chained:
        # Slurm runs the jobs of one name one by one: the name must be of this run alone.
        digest = hashlib.sha256(str(run_dir.path).encode()).hexdigest()
        name = f"{name}-{digest[:_DIGITS_OF_RUN_DIR]}"
        words += ["--no-requeue", "--dependency=singleton"]
    fixed = ["sbatch", "--parsable", f"--export={exported}", f"--job-name={name}"]
    fixed.append(f"--output={log}")
    script = str(slurm_root() / "pretrain.sbatch")
    return Job((*fixed, *words, script, *arguments), run_dir)


def _tasks_per_node(cluster: ClusterConfig, ranks: int) -> tuple[str, str]:
    """Return the exports and the flag that make srun start `ranks` tasks on each node.

    sbatch never gives more nodes than there are tasks on MIN of them: `--nodes=1-16` with
    `--ntasks-per-node=8` gets 8 at most. There, the CPUs of the tasks are asked for, and only
    srun gets their number.
    """
    least, most = node_range(cluster.nodes or "1")
    if least * ranks >= most:
        return "ALL", f"--ntasks-per-node={ranks}"
    cpus = ranks * (cluster.cpus_per_task or 1)
    return f"ALL,SLURM_NTASKS_PER_NODE={ranks}", f"--mincpus={cpus}"


def absolute_run_dir(config: ZetaConfig) -> RunDir:
    """Return the run directory as a job sees it, which starts in the folder it is submitted in."""
    return RunDir(Path.cwd() / run_directory(config).path)


def submission_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that sbatch passes on to the job.

    Variables of another job, in which this process may run, are left out. `zeta` of the running
    installation comes first on PATH.
    """
    ours = {
        name: value
        for name, value in environment.items()
        if not name.startswith("SLURM_") or name in _ABOUT_THE_CLUSTER
    }
    folder = Path(sys.executable).parent
    if (folder / "zeta").exists():
        ours["PATH"] = os.pathsep.join([str(folder), *filter(None, [ours.get("PATH")])])
    return ours


def submit(job: Job) -> int:
    """Submit a job and return its id.

    Raises:
        NotSubmittedError: sbatch is not on PATH, or Slurm refuses the job; with its message.
        RunError: sbatch did not answer.
    """
    try:
        environment = submission_environment(os.environ)
        done = run_slurm(job.command, timeout_s=_SBATCH_TIMEOUT_S, environment=environment)
    except SlurmMissingError:
        raise NotSubmittedError(
            "sbatch is not on PATH: submit from a login node of the cluster, or type --dry-run to "
            "see what would be submitted"
        ) from None
    except SlurmUnavailableError as error:
        raise RunError(
            f"{error}; check with squeue whether the job was submitted before you submit it again"
        ) from None
    messages = slurm_messages(done.stderr)
    # With --clusters or in a federation: "id;cluster".
    job_id = done.stdout.strip().split(";")[0]
    if done.returncode != 0 or not job_id.isdecimal():
        words = "; ".join(messages) or f"it ended with {done.returncode} and no message"
        kind = NotSubmittedError if done.returncode != 0 else RunError
        raise kind(f"sbatch refused the job: {words}")
    for line in messages:
        print(f"sbatch: {line}", file=sys.stderr)
    return int(job_id)


def submit_chain(job: Job, links: int) -> list[int]:
    """Submit a job `links` times, to run one after another, and return the ids.

    Raises:
        NotSubmittedError, RunError: as `submit`; once links were submitted, a RunError names them.
    """
    ids: list[int] = []
    for _ in range(links):
        try:
            ids.append(submit(job))
        except RunError as error:
            if not ids:
                raise
            listed = ", ".join(map(str, ids))
            raise RunError(
                f"{len(ids)} of {links} jobs were submitted ({listed}), then {error}"
            ) from error
    return ids
