"""A chain of jobs, where none may be requeued: each goes on where the one before had to stop.

`zeta` is a script here that ends as told; test_launch_slurm.py runs the real one.
"""

from __future__ import annotations

import pytest

from tests.slurm.test_sbatch_script import Jobs

pytestmark = pytest.mark.slow

CHAIN = ("--no-requeue", "--dependency=singleton", "--job-name=chain")
LINK = "link=$(wc -l < starts.$rank); mkdir -p run/checkpoints\n"


@pytest.fixture
def run_chain(cluster, tmp_path):
    """Submit a chain, wait for its end, and return (states, exit codes, logs, starts)."""
    jobs = Jobs(cluster, tmp_path)

    def run(links: int, body: str, limits: str = ""):
        ids = [jobs.submit(LINK + body, flags=CHAIN, limits=limits) for _ in range(links)]
        records = [cluster.wait_for_job(job) for job in ids]
        ends = [(record["JobState"], record["ExitCode"]) for record in records]
        assert all(record["Restarts"] == "0" for record in records)
        assert [len(cluster.completed(job)) for job in ids] == [1] * links
        return ends, [jobs.log(job) for job in ids], jobs.starts()

    return run


def test_the_next_job_goes_on_after_a_save_and_after_a_crash(run_chain):
    body = (
        "echo step_$link > run/checkpoints/latest\n"
        "((link == 1)) && exit 85; ((link == 2)) && exit 1; exit 0\n"
    )
    ends, logs, starts = run_chain(3, body)
    assert ends == [("FAILED", "85:0"), ("FAILED", "1:0"), ("COMPLETED", "0:0")]
    assert "saved; the next job of the chain continues" in logs[0]
    assert "ended with 1; the next job of the chain continues" in logs[1]
    assert starts == 3


def test_what_is_left_of_the_chain_of_a_finished_run_ends_at_once(run_chain):
    ends, logs, starts = run_chain(3, "touch run/FINISHED; exit 0\n")
    assert ends == [("COMPLETED", "0:0")] * 3
    assert all("nothing is left" in log for log in logs[1:])
    assert starts == 1


def test_what_a_restart_would_repeat_is_not_tried_again_by_the_chain(run_chain):
    ends, logs, starts = run_chain(3, "exit 93\n")
    assert ends == [("FAILED", "93:0")] * 3
    assert all("giving up" in log for log in logs[1:])
    assert starts == 1


def test_a_chain_without_new_checkpoints_gives_up(run_chain):
    body = "echo step_1 > run/checkpoints/latest; exit 1\n"
    ends, logs, starts = run_chain(4, body, limits="ZETA_MAX_STALLED=2")
    assert [code for _, code in ends] == ["1:0", "1:0", "1:0", "93:0"]
    assert "2 starts in a row without a new checkpoint" in logs[3]
    assert starts == 3
