"""`zeta launch slurm` on a real cluster, with the real `zeta`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.shards.build import build_shards
from launch.status.audit import audit_run
from tests.data_pipeline.shard_fixtures import jpeg

STEPS = 60
KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    samples = [
        (f"s{i}", {"jpg": jpeg(24 + i % 60, 96 - i % 50, i), "cls": str(i % 2).encode()})
        for i in range(80)
    ]
    build_shards(samples, folder, class_names=["a", "b"])
    return folder


def launch(
    cluster, folder: Path, *words: object, command: str = "slurm"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch", "launch", command, *map(str, words)],
        cwd=folder,
        env=cluster.environment | {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_wrong_partition_is_one_message_in_the_words_of_slurm(cluster, shards, tmp_path):
    partition = "no $(touch pwned) 'one'"
    words = ["--cluster", "loopback", "--partition", partition, f"data.shards={shards}"]
    done = launch(cluster, tmp_path, "demo", *words)
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "sbatch refused the job" in line
    assert "partition" in line
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.slow
def test_the_doctor_asks_the_cluster_without_submitting(cluster, shards, tmp_path):
    before = cluster.run("squeue", "--noheader", "--states=all")
    words = ["demo", "--cluster", "loopback", f"data.shards={shards}"]
    well = launch(cluster, tmp_path, *words, command="doctor")
    assert well.returncode == 0, well.stdout
    rows = {line[9:24].strip(): line for line in well.stdout.splitlines()}
    assert rows["partition"].endswith("main: 2 nodes, 2 usable, 2 idle")
    assert "n[1-2]" in rows["job"]
    ill = launch(cluster, tmp_path, *words, "--partition", "gpu", command="doctor")
    assert ill.returncode == 1
    rows = {line[9:24].strip(): line for line in ill.stdout.splitlines()}
    assert rows["partition"].startswith("failed")
    assert "there are: main" in rows["partition"]
    assert "invalid partition" in rows["job"].lower()
    assert cluster.run("squeue", "--noheader", "--states=all") == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_chain_of_three_brings_a_run_to_its_end(cluster, shards, tmp_path):
    run_dir = tmp_path / 'it\'s 50%j of "$(touch pwned)"'
    done = launch(
        cluster, tmp_path, "demo", "--cluster", "loopback", "--chain", 3, "--json",
        f"data.shards={shards}", f"run.dir={run_dir}", "run.name=$(touch pwned); a 'b'",
        f"train.max_steps={STEPS}", "train.log_every=1", "optim.warmup_steps=1",
        "tracker.wandb.mode=disabled",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    first = said["job_id"]
    jobs = [first, first + 1, first + 2]
    assert said["run_dir"] == str(run_dir)
    metrics = run_dir / "metrics.jsonl"
    cluster.wait_until(lambda: metrics.exists() and len(metrics.read_text().split("\n")) > 3, 120)
    cluster.run("scancel", "--signal=USR1", first)
    records = [cluster.wait_for_job(job, timeout=240) for job in jobs]
    logs = [(run_dir / f"logs/slurm-{job}.log").read_text() for job in jobs]
    ends = [(record["JobState"], record["ExitCode"]) for record in records]
    assert ends == [("FAILED", "85:0"), ("COMPLETED", "0:0"), ("COMPLETED", "0:0")], logs
    assert [record["Restarts"] for record in records] == ["0"] * 3
    assert said["log"] == str(run_dir / f"logs/slurm-{first}.log")
    starts = [record["StartTime"] for record in records]
    assert starts == sorted(starts)
    assert records[1]["StartTime"] >= records[0]["EndTime"]  # never two at once
    assert "nothing is left" in logs[2]
    lines = [json.loads(line) for line in metrics.open()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))  # no step twice, none left out
    assert audit_run(str(run_dir)).exact
    assert not list(tmp_path.rglob("pwned"))
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    asked = cluster.run("scontrol", "show", "job", first)
    assert KEY not in asked + cluster.run("scontrol", "write", "batch_script", first, "-")
