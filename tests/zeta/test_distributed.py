"""A rank finds its place from any launcher, and its device."""

from __future__ import annotations

import pytest
import torch

from zeta.distributed import RankInfo, choose_device, rank_from_environment

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29501",
}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "n1,n2,n3,n4",
    "SLURM_JOB_ID": "123456",
}


def test_torchruns_variables_give_the_rank():
    info = rank_from_environment(TORCHRUN)
    assert info == RankInfo(5, 8, 1, 4, "10.0.0.1", 29501)


def test_a_slurm_step_gives_rank_master_and_a_port_of_the_job():
    info = rank_from_environment(SLURM)
    assert info == RankInfo(6, 7, 0, 1, "n1", 23456, from_slurm=True)


def test_a_batch_script_alone_is_a_single_process():
    assert rank_from_environment({"SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}) == RankInfo()


def test_half_a_launcher_is_an_error_that_names_what_is_missing():
    with pytest.raises(ValueError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"):
        rank_from_environment({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("info", "kind", "visible", "expected"),
    [
        (RankInfo(), "auto", 0, "cpu"),
        (RankInfo(), "cpu", 8, "cpu"),
        (RankInfo(rank=9, world_size=16, local_rank=1, local_world_size=8), "auto", 8, "cuda:1"),
        (RankInfo(local_rank=3, local_world_size=4, from_slurm=True), "cuda", 1, "cuda:0"),
    ],
)
def test_a_rank_takes_its_own_device(info, kind, visible, expected):
    assert choose_device(info, kind, visible) == torch.device(expected)


@pytest.mark.parametrize("visible", [1, 2])
def test_more_ranks_than_devices_are_refused_with_both_numbers(visible):
    with pytest.raises(ValueError, match=f"4 ranks on this machine but only {visible} CUDA"):
        choose_device(RankInfo(local_rank=3, local_world_size=4), "auto", visible)


def test_a_missing_device_is_refused():
    with pytest.raises(ValueError, match=r"train\.device is cuda, but no CUDA device"):
        choose_device(RankInfo(), "cuda", 0)
