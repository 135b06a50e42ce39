"""The cluster fixture itself: what the other tests of this folder take for granted."""

from __future__ import annotations

import time

from tests.slurm.cluster import Cluster


def test_a_step_runs_its_tasks_on_both_nodes(cluster, tmp_path):
    script = "srun --output=none bash -c 'echo $SLURM_PROCID > $SLURMD_NODENAME.$SLURM_PROCID'"
    job = cluster.submit(
        "--nodes=2", "--ntasks-per-node=2", "--output=none", f"--wrap={script}", cwd=tmp_path
    )
    assert cluster.wait_for_job(job)["JobState"] == "COMPLETED"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n1.0", "n1.1", "n2.2", "n2.3"]


def test_slurm_records_how_a_job_ended(cluster):
    job = cluster.submit("--output=none", "--wrap=exit 7")
    assert cluster.wait_for_job(job)["ExitCode"] == "7:0"
    assert [record["ExitCode"] for record in cluster.completed(job)] == ["7:0"]


def test_nothing_is_left_after_the_cluster_is_stopped(cluster, tmp_path):
    other = Cluster(nodes=1)  # beside the shared one: their ports and folders differ
    try:
        other.start()
        job = other.submit(
            "--output=none", "--wrap=trap '' TERM; touch up; sleep 1000", cwd=tmp_path
        )
        other.wait_until((tmp_path / "up").exists, 30)
        assert other.job(job)["JobState"] == "RUNNING"
    finally:
        other.stop()
    deadline = time.monotonic() + 5
    while other.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert other.processes() == []
    assert not other.folder.exists()
    assert "UP" in cluster.run("scontrol", "ping")
