"""Check a run, submit it to Slurm and print where it is: `zeta launch slurm`."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence

from launch.cluster.slurm import (
    Job,
    NotSubmittedError,
    cores_warning,
    job_for,
    most_ranks,
    submit_chain,
)
from launch.config.load import ZetaConfig, load_config
from launch.run.checks import check_start
from launch.shipped import slurm_root
from zeta.exit_codes import ExitCode
from zeta.run.directory import RunDir
from zeta.tracking.config import WandbConfig
from zeta.tracking.wandb_mode import resolve_mode, run_page, stable_run_id


def submit_run(
    config_name: str,
    overrides: Sequence[str],
    *,
    chain: int | None = None,
    dry_run: bool = False,
    as_json: bool = False,
) -> int:
    """Check a run as its ranks would, submit it, and print where it is.

    Args:
        config_name: a YAML file, or the name of a shipped recipe.
        overrides: `key=value` settings.
        chain: number of jobs to submit that run one after another, instead of one that is requeued.
        dry_run: print command and script, and submit and write nothing.
        as_json: print {`job_id`, `run_dir`, `log`} instead; job id and log are null where nothing
            was submitted. A dry run adds `command`: the words that would be run, `chain` times.

    Raises:
        ValueError, RunError: every rank would refuse the run; the config sets no nodes or ranks;
            sbatch is missing, or refuses the job.
    """
    config = load_config(config_name, overrides)
    ranks = most_ranks(config)
    job = job_for(config, [config_name, *overrides], chained=chain is not None)
    finished = check_start(config, ranks).already_finished
    if finished is not None:
        if as_json:
            _print_json(job, None)
        else:
            print(finished)
        return ExitCode.FINISHED
    if dry_run:
        _warn(config)
        if as_json:
            _print_json(job, None, command=job.command)
        else:
            print(_dry_run(job, chain or 1))
        return ExitCode.FINISHED
    with _prepared(job.run_dir, chained=chain is not None):
        ids = submit_chain(job, chain or 1)
    _warn(config)
    if as_json:
        _print_json(job, ids[0])
    else:
        print("\n".join(_summary(job, ids, config)))
    return ExitCode.FINISHED


@contextlib.contextmanager
def _prepared(run_dir: RunDir, *, chained: bool) -> Iterator[None]:
    """Make the folder of the logs, which Slurm does not create.

    Folders that did not exist are removed if no job was submitted.
    """
    made = [folder for folder in (run_dir.logs, *run_dir.logs.parents) if not folder.exists()]
    run_dir.logs.mkdir(parents=True, exist_ok=True)
    if chained:
        # The jobs of a chain would take these for those of the job before.
        run_dir.finished.unlink(missing_ok=True)
        run_dir.slurm_restarts.unlink(missing_ok=True)
    try:
        yield
    except NotSubmittedError:
        with contextlib.suppress(OSError):  # another launcher has put something there meanwhile
            for folder in made:
                folder.rmdir()
        raise


def _warn(config: ZetaConfig) -> None:
    if (warning := cores_warning(config)) is not None:
        print(f"zeta: warning: {warning}", file=sys.stderr)


def _dry_run(job: Job, links: int) -> str:
    command = shlex.join(job.command)
    script = (slurm_root() / "pretrain.sbatch").read_text()
    return "\n".join([*[command] * links, "", script.rstrip()])


def _print_json(job: Job, job_id: int | None, **more: object) -> None:
    log = None if job_id is None else str(job.log(job_id))
    print(json.dumps({"job_id": job_id, "run_dir": str(job.run_dir.path), "log": log, **more}))


def _summary(job: Job, ids: list[int], config: ZetaConfig) -> list[str]:
    """Return the lines for a person."""
    cluster = config.cluster
    nodes = f"{cluster.nodes} node{'' if cluster.nodes == '1' else 's'}"
    one = "GPU" if config.train.device != "cpu" else "rank"
    each = cluster.gpus_per_node or cluster.tasks_per_node or 1
    what = f"{nodes}, {each} {one}{'' if each == 1 else 's'} each"
    if len(ids) == 1:
        first = f"job {ids[0]} submitted: {what}"
    else:
        first = f"jobs {ids[0]} to {ids[-1]} submitted, one after another: {what}"
    rows = [
        ("run directory", str(job.run_dir.path)),
        ("log", f"{job.log(ids[0])}{', and one for each other job' if len(ids) > 1 else ''}"),
        ("W&B", _tracked(job.run_dir, config.tracker.wandb)),
        ("follow it", f"zeta launch watch {shlex.quote(str(job.run_dir.path))}"),
    ]
    return [first, *[f"  {label:<14}{value}" for label, value in rows]]


def _tracked(run_dir: RunDir, config: WandbConfig) -> str:
    """Return where the run will be in W&B."""
    mode = resolve_mode(config.mode, os.environ)
    if mode == "disabled":
        return "disabled"
    if mode == "offline":
        return f"offline; `zeta wandb-sync {shlex.quote(str(run_dir.path))}` uploads it"
    run_id = stable_run_id(run_dir.wandb_run_id)
    return run_page(config, run_id, os.environ) or f"run {run_id} of project {config.project}"
