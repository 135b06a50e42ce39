"""`sbatch slurm/pretrain.sbatch CONFIG` with the real `zeta`, on two nodes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.build import build_shards
from launch.shipped import slurm_root

SHORT = ["train.max_steps=4", "train.log_every=1", "optim.warmup_steps=1"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / "src" / name).mkdir(parents=True)
        for number in range(40):
            pixels = draw.integers(0, 255, (*draw.integers(24, 96, 2), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "src" / name / f"{number}.jpg")
    build_shards(folder / "src", folder / "shards")
    return folder / "shards"


def submit(cluster, folder: Path, *arguments: str) -> int:
    path = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    return cluster.submit(
        "--nodes=2",
        "--ntasks-per-node=1",
        f"--export=ALL,PATH={path}",
        slurm_root() / "pretrain.sbatch",
        *arguments,
        cwd=folder,
    )


@pytest.mark.slow
def test_a_run_on_two_nodes_goes_to_its_end(cluster, shards, tmp_path):
    run_dir = tmp_path / "a run"
    job = submit(cluster, tmp_path, "demo", f"data.shards={shards}", f"run.dir={run_dir}", *SHORT)
    record = cluster.wait_for_job(job, timeout=300)
    log = (tmp_path / f"slurm-{job}.log").read_text()
    assert (record["JobState"], record["ExitCode"], record["NodeList"]) == (
        "COMPLETED",
        "0:0",
        "n[1-2]",
    ), log
    assert (run_dir / "FINISHED").exists()
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").open()]
    assert steps[-1] == 4
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == "step_00000004"
    assert {path.name for path in (run_dir / "logs").glob("rank_*.log")} == {
        "rank_00000.log",
        "rank_00001.log",
    }


def test_a_config_error_ends_the_job_with_93_and_its_message(cluster, shards, tmp_path):
    job = submit(cluster, tmp_path, "demo", f"data.shards={shards}", "train.lr=1")
    record = cluster.wait_for_job(job)
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "93:0", "0")
    last = (tmp_path / f"slurm-{job}.log").read_text().splitlines()[-1]
    assert "unknown config key train.lr" in last
    assert "did you mean optim.lr?" in last


@pytest.mark.slow
def test_shards_that_are_not_there_end_the_job_with_93(cluster, tmp_path):
    job = submit(cluster, tmp_path, "demo", f"data.shards={tmp_path / 'nowhere'}")
    record = cluster.wait_for_job(job, timeout=300)
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "93:0", "0")
    assert str(tmp_path / "nowhere") in (tmp_path / f"slurm-{job}.log").read_text()
