"""Preflight on a real cluster: a bad node is named, listed, and the job goes on without it.

The first tests play `zeta`, to see what the script makes of an answer; the last ones run the real
one, with storage that one of two nodes does not have.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from data_pipeline.shards.build import build_shards
from launch.shipped import slurm_root
from tests.data_pipeline.shard_fixtures import jpeg
from tests.slurm.test_sbatch_script import Jobs
from tests.zeta.training import ROOT

N2_IS_BAD = "((SLURM_PROCID == 0)) && [[ $SLURM_JOB_NODELIST == *2* ]] && echo n2; exit 86;"
FIT = "[[ $SLURM_JOB_NODELIST == n1 ]] && exit 0;"


@pytest.fixture
def jobs(cluster, tmp_path) -> Jobs:
    return Jobs(cluster, tmp_path)


@pytest.mark.slow
def test_a_job_is_requeued_without_the_node_that_is_bad_and_that_counts_as_no_stall(jobs):
    job = jobs.submit(
        "exit 0\n",
        flags=("--nodes=1-2", "--ntasks-per-node=2", "--requeue"),
        limits="ZETA_MAX_STALLED=1",
        preflight=FIT + N2_IS_BAD,
        words="preflight:60",
    )
    record = jobs.cluster.wait_for_job(job)
    ended = ("JobState", "ExitCode", "Restarts", "ExcNodeList", "NodeList")
    assert [record[key] for key in ended] == ["COMPLETED", "0:0", "1", "n2", "n1"], jobs.log(job)
    assert "continuing without n2" in jobs.log(job)
    assert jobs.starts() == 1  # no rank was started beside the bad node


def test_nodes_to_avoid_add_up(jobs):
    """What the user excludes stays excluded; here the job waits then, as no node is left."""
    answer = "echo n2; exit 86;"
    flags = ("--nodes=1", "--requeue", "--exclude=n1")
    job = jobs.submit("exit 0\n", flags=flags, preflight=answer, words="preflight:60")
    jobs.cluster.wait_until(lambda: jobs.cluster.job(job)["ExcNodeList"] != "n1", 60)
    avoided = jobs.cluster.job(job)["ExcNodeList"]
    hosts = jobs.cluster.run("scontrol", "show", "hostnames", avoided).split()
    assert set(hosts) == {"n1", "n2"}
    jobs.cluster.run("scancel", job)


def test_where_the_job_may_not_be_requeued_it_says_which_node_to_exclude(jobs):
    job = jobs.submit(
        "exit 0\n", flags=("--no-requeue",), preflight=N2_IS_BAD, words="preflight:60"
    )
    record = jobs.cluster.wait_for_job(job)
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "86:0")
    assert "submit the same command again with --exclude=n2" in jobs.log(job).splitlines()[-1]


@pytest.mark.slow
def test_the_rest_of_a_chain_avoids_the_bad_node(jobs):
    chain = (
        "--nodes=1-2",
        "--ntasks-per-node=2",
        "--no-requeue",
        "--dependency=singleton",
        "--job-name=without n2",
    )
    options = {"flags": chain, "preflight": FIT + N2_IS_BAD, "words": "preflight:60"}
    first, second = (jobs.submit("exit 0\n", **options) for _ in range(2))
    assert jobs.cluster.wait_for_job(first)["ExitCode"] == "86:0"
    record = jobs.cluster.wait_for_job(second)
    assert (record["JobState"], record["ExcNodeList"]) == ("COMPLETED", "n2"), jobs.log(second)


@pytest.mark.parametrize(("status", "state"), [(93, "FAILED"), (0, "COMPLETED")])
def test_ranks_start_only_where_preflight_found_nothing(jobs, status, state):
    job = jobs.submit("exit 0\n", preflight=f"exit {status};", words="preflight:60")
    record = jobs.cluster.wait_for_job(job)
    assert (record["JobState"], record["ExitCode"]) == (state, f"{status}:0")
    assert (jobs.folder / "starts.0").exists() == (status == 0)


def test_a_run_that_a_person_stopped_is_not_requeued(jobs):
    job = jobs.submit("exit 130\n")
    record = jobs.cluster.wait_for_job(job)
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == (
        "FAILED",
        "130:0",
        "0",
    )
    assert "stopped by a person; not requeued" in jobs.log(job)


def test_environment_and_container_come_from_the_config_and_nothing_in_them_is_executed(jobs):
    nasty = """it's "a" $(touch pwned) `touch pwned`; touch pwned\nand *"""
    words = [f"env:FROM_CONFIG={nasty}", "srun:--comment=$(touch pwned)", "wrap:env"]
    words += [f"wrap:FROM_WRAPPER={nasty}"]
    job = jobs.submit(
        'printf "%s\\0" "$FROM_CONFIG" "$FROM_WRAPPER" > "seen.$rank"\n',
        words=" ".join(shlex.quote(word) for word in words),
    )
    assert jobs.cluster.wait_for_job(job)["JobState"] == "COMPLETED", jobs.log(job)
    for rank in (0, 1):
        assert (jobs.folder / f"seen.{rank}").read_text().split("\0") == [nasty, nasty, ""]
    assert not (jobs.folder / "pwned").exists()


# The real `zeta`.


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "shards"
    samples = [
        (f"s{i}", {"jpg": jpeg(40, 40 + 8 * (i % 3), i), "cls": str(i % 3).encode()})
        for i in range(40)
    ]
    build_shards(samples, folder, class_names=["a", "b", "c"])
    return folder


@pytest.fixture
def submit(cluster, tmp_path):
    """Submit the script, with the real `zeta`, on nodes of which n2 finds a folder empty."""

    def submit(hidden: Path, nodes: str, *settings: str) -> int:
        zeta = tmp_path / "bin" / "zeta"
        zeta.parent.mkdir()
        hide = 'mount -t tmpfs none "$0"; exec "$@"'
        zeta.write_text(
            f'#!/bin/bash\nexport PYTHONPATH={ROOT}\nrun=({sys.executable} -P -m launch "$@")\n'
            '[[ ${SLURMD_NODENAME:-} == n2 ]] || exec "${run[@]}"\n'
            f"exec unshare --mount bash -c '{hide}' {shlex.quote(str(hidden))} \"${{run[@]}}\"\n"
        )
        zeta.chmod(0o755)
        return cluster.submit(
            f"--nodes={nodes}",
            f"--export=ALL,PATH={zeta.parent}:{cluster.environment['PATH']},OMP_NUM_THREADS=1",
            slurm_root() / "pretrain.sbatch",
            "demo",
            *settings,
            "train.max_steps=3",
            "train.log_every=1",
            "optim.warmup_steps=1",
            "train.packs_per_step=4",
            "tracker.wandb.mode=disabled",
            cwd=tmp_path,
        )

    return submit


@pytest.mark.slow
def test_shards_that_one_node_does_not_see_cost_that_node_and_not_the_run(
    cluster, submit, shards, tmp_path
):
    run_dir = tmp_path / "a run"
    job = submit(shards, "1-2", f"data.shards={shards}", f"run.dir={run_dir}")
    record = cluster.wait_for_job(job, timeout=300)
    log = (tmp_path / f"slurm-{job}.log").read_text()
    ended = ("JobState", "ExitCode", "Restarts", "ExcNodeList", "NodeList")
    assert [record[key] for key in ended] == ["COMPLETED", "0:0", "1", "n2", "n1"], log
    (line,) = (run_dir / "excluded_nodes").read_text().splitlines()
    node, _time, reason = line.split(" ", 2)
    assert (node, str(shards) in reason) == ("n2", True)
    assert f"zeta: preflight: node n2 is bad: {reason}" in log
    assert "1 node well, no GPUs" in log
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").open()]
    assert steps[-1] == 3
    assert len(list((run_dir / "ledger").glob("rank_*.jsonl"))) == 1  # no rank ran on n2


@pytest.mark.slow
def test_a_run_directory_on_a_local_disk_ends_the_job_with_93_and_its_name(
    cluster, submit, shards, tmp_path
):
    local = tmp_path / "local"
    local.mkdir()
    job = submit(local, "2", f"data.shards={shards}", f"run.dir={local / 'run'}")
    record = cluster.wait_for_job(job, timeout=300)
    log = (tmp_path / f"slurm-{job}.log").read_text()
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "93:0", "0")
    assert "run.dir lies on a disk of n1 alone" in log
    assert log.count("zeta: error") == 1


@pytest.mark.slow
def test_where_too_few_nodes_would_be_left_the_job_ends_with_93(cluster, submit, shards, tmp_path):
    job = submit(shards, "2", f"data.shards={shards}", f"run.dir={tmp_path / 'run'}")
    record = cluster.wait_for_job(job, timeout=300)
    log = (tmp_path / f"slurm-{job}.log").read_text()
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "93:0", "0")
    assert "partition main has 1 node, and this job needs 2" in log
    assert (tmp_path / "run" / "excluded_nodes").read_text().startswith("n2 ")
