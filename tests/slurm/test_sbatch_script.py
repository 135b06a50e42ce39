"""slurm/pretrain.sbatch on a real cluster: what it makes of the exit statuses of the ranks.

`zeta` is a script here that ends as a test wants it; test_recovery.py runs the real one.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from launch.shipped import slurm_root

SCRIPT = slurm_root() / "pretrain.sbatch"


class Jobs:
    """Submits the script with a `zeta` that does as told."""

    def __init__(self, cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.run_dir = folder / "run"

    def submit(
        self,
        body: str,
        *arguments: str,
        flags: tuple[str, ...] = (),
        limits: str = "",
        words: str = "",
        preflight: str = "exit 0;",
    ) -> int:
        """`words`: what `launch check` says besides, in quotes; `preflight`: what that one does."""
        zeta = self.folder / "bin" / "zeta"
        zeta.parent.mkdir(exist_ok=True)
        zeta.write_text(
            "#!/bin/bash\n"
            f"if [[ $2 == check ]]; then printf '%s\\0' run_dir:run {words}; exit; fi\n"
            f"if [[ $2 == preflight ]]; then {preflight} fi\n"
            "restarts=${SLURM_RESTART_COUNT:-0}; rank=$SLURM_PROCID\n"
            'echo "$restarts" >> "starts.$rank"\n' + body
        )
        zeta.chmod(0o755)
        path = f"{zeta.parent}:{self.cluster.environment['PATH']}"
        return self.cluster.submit(
            "--nodes=2",
            f"--export=ALL,PATH={path},{limits}".rstrip(","),
            *flags,
            SCRIPT,
            *arguments,
            cwd=self.folder,
        )

    def log(self, job: int) -> str:
        return (self.folder / f"slurm-{job}.log").read_text()

    def starts(self) -> int:
        return len((self.folder / "starts.0").read_text().split())


@pytest.fixture
def jobs(cluster, tmp_path) -> Jobs:
    return Jobs(cluster, tmp_path)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize(
    "script", sorted(slurm_root().glob("*.sbatch")), ids=lambda path: path.name
)
def test_shellcheck_finds_nothing(script):
    subprocess.run(["shellcheck", "--shell=bash", script], check=True)


@pytest.mark.parametrize(
    "script", sorted(slurm_root().glob("*.sbatch")), ids=lambda path: path.name
)
def test_bash_can_parse_it(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_ranks_that_finish_end_the_job(jobs):
    job = jobs.submit("exit 0\n")
    record = jobs.cluster.wait_for_job(job)
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("COMPLETED", "0:0", "0")
    assert "finished" in jobs.log(job).splitlines()[-1]


def test_93_ends_the_job_without_a_requeue(jobs):
    job = jobs.submit("exit 93\n")
    record = jobs.cluster.wait_for_job(job)
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "93:0", "0")
    assert "not requeued" in jobs.log(job).splitlines()[-1]


@pytest.mark.slow
def test_85_requeues_though_one_rank_leaves_later_than_the_other(jobs):
    job = jobs.submit("((restarts == 1)) && exit 0; sleep $rank; exit 85\n")
    record = jobs.cluster.wait_for_job(job)
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert "saved; requeueing" in jobs.log(job)


@pytest.mark.slow
def test_usr1_reaches_the_ranks_and_not_the_batch_shell(jobs):
    body = (
        "((restarts == 1)) && exit 0\n"
        "trap 'exit 85' USR1; touch up.$rank; while :; do sleep 0.1; done\n"
    )
    job = jobs.submit(body)
    jobs.cluster.wait_until(lambda: all((jobs.folder / f"up.{r}").exists() for r in (0, 1)), 30)
    jobs.cluster.run("scancel", "--signal=USR1", job)
    record = jobs.cluster.wait_for_job(job)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1")


@pytest.mark.slow
def test_a_crash_is_requeued_only_while_checkpoints_move_on(jobs):
    body = (
        "mkdir -p run/checkpoints\n"
        "((restarts == 0)) && echo step_00000001 > run/checkpoints/latest\n"
        "exit 1\n"
    )
    job = jobs.submit(body, limits="ZETA_MAX_STALLED=2")
    record = jobs.cluster.wait_for_job(job)
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "93:0")
    # The first start made a checkpoint; the next two did not.
    assert jobs.starts() == 3
    assert "2 starts in a row without a new checkpoint" in jobs.log(job)


@pytest.mark.slow
def test_restarts_are_bounded_whatever_their_cause(jobs):
    body = (
        "mkdir -p run/checkpoints; echo step_$restarts > run/checkpoints/latest\n"
        "((restarts == 0)) && sleep 1000\n"
        "exit 85\n"
    )
    job = jobs.submit(body, limits="ZETA_MAX_RESTARTS=1")
    jobs.cluster.wait_until((jobs.folder / "starts.0").exists, 30)
    jobs.cluster.run("scontrol", "requeue", job)  # not ours: as after a node failure
    record = jobs.cluster.wait_for_job(job)
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "93:0")
    assert jobs.starts() == 2
    assert "giving up after 2 restarts" in jobs.log(job)


def test_no_requeue_where_the_user_forbids_it_says_what_to_do(jobs):
    job = jobs.submit("exit 85\n", flags=("--no-requeue",))
    record = jobs.cluster.wait_for_job(job)
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "85:0")
    assert "submit the same command again" in jobs.log(job).splitlines()[-1]


def test_settings_reach_the_ranks_as_they_were_typed(jobs):
    words = ["demo", 'run.name=it\'s a "name"; $(touch pwned) `id` *', "data.shards={a,b} c"]
    job = jobs.submit('printf "%s\\n" "$@" > "words.$rank"\n', *words)
    jobs.cluster.wait_for_job(job)
    for rank in (0, 1):
        assert (jobs.folder / f"words.{rank}").read_text().splitlines() == ["train", *words]
    assert not (jobs.folder / "pwned").exists()
