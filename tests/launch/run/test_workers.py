"""`data.workers: auto` takes the cores that a rank may use, and no more."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from data_pipeline.config import DataConfig
from launch.config.load import load_config
from launch.run import workers
from launch.run.workers import loader_workers, rank_cores


@pytest.fixture
def cores(monkeypatch):
    return lambda count: monkeypatch.setattr(workers.joblib, "cpu_count", lambda: count)


def torchrun(local):
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": str(local)}
    return ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_ranks_of_a_machine_share_its_cores(cores):
    cores(64)
    assert [rank_cores({}), rank_cores(torchrun(8)), rank_cores(torchrun(4))] == [64, 8, 16]
    cores(2)
    assert rank_cores(torchrun(8)) == 1


def test_cores_that_slurm_gives_to_each_task_are_not_shared_again(cores):
    slurm = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "8"}
    slurm |= {"SLURM_STEP_NODELIST": "n1", "SLURM_CPUS_PER_TASK": "16"}
    for visible in (16, 128):  # bound to its cores, or not
        cores(visible)
        assert rank_cores(slurm) == 16


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_cores_are_those_of_the_affinity():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert rank_cores({}) == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("device", "there", "found"), [("auto", True, 15), ("cpu", True, 2), ("auto", False, 2)]
)
def test_a_rank_on_a_gpu_decodes_with_all_cores_but_one(monkeypatch, cores, device, there, found):
    monkeypatch.setattr(workers.torch.cuda, "is_available", lambda: there)
    cores(16)
    config = load_config("navit_b16_classification", ["data.shards=x", f"train.device={device}"])
    assert config.data.workers == "auto"
    assert loader_workers(config, {}) == found
    fixed = replace(config, data=replace(config.data, workers=5))
    assert loader_workers(fixed, {}) == 5


@pytest.mark.parametrize("value", [-1, "many", 1.5, True])
def test_another_value_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"data\.workers"):
        DataConfig(workers=value)


def test_ranks_that_a_task_of_slurm_has_started_share_the_cores_of_the_task(cores):
    cores(64)
    assert rank_cores(torchrun(8) | {"SLURM_CPUS_PER_TASK": "32"}) == 4
