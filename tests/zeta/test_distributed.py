"""A rank finds its place from any launcher, and its device."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from launch.run.ranks import rank_environment
from tests.zeta.training import ROOT
from zeta.distributed import RankInfo, choose_device, meeting_place, rank_from_environment

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


def test_a_restart_of_a_job_takes_another_port():
    starts = [rank_from_environment(SLURM | {"SLURM_RESTART_COUNT": str(n)}) for n in range(100)]
    ports = [info.master_port for info in starts]
    assert len(set(ports)) == 100
    assert all(20000 <= port < 30000 for port in ports)


def test_a_taken_port_is_one_message_and_no_reason_to_give_up():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        info = RankInfo(0, 2, 0, 2, "127.0.0.1", port)
        with pytest.raises(ConnectionError, match=rf"at 127.0.0.1, port {port}: .*in use"):
            meeting_place(info, 5.0)


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


def test_variables_left_in_the_submitting_shell_do_not_split_a_slurm_step():
    """Each task would train by itself, all in one run directory."""
    left = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    left |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    info = rank_from_environment({**SLURM, **left})
    assert (info.rank, info.world_size, info.from_slurm) == (6, 7, True)
    assert info.master_port == 23456


def test_torchrun_inside_a_slurm_step_decides():
    assert rank_from_environment({**SLURM, **TORCHRUN}).rank == 5


@pytest.mark.slow
def test_collectives_agree_on_every_rank(ranks, tmp_path):
    outputs = ranks.run("tests.zeta.distributed_jobs.collectives", 3, {})
    expected = {
        "sum": [3.0, 6.0],
        "all": [False, True],
        "gather": ["rank 0", "rank 1", "rank 2"],
        "broadcast": "from 0",
    }
    for output in outputs:
        assert json.loads(output.splitlines()[-1]) == expected


@pytest.mark.slow
def test_deepspeed_gathers_weights_in_place_and_to_the_bit(ranks):
    ranks.run("tests.zeta.distributed_jobs.gathers", 3, {})


@pytest.mark.slow
def test_training_starts_and_saves_with_no_compiler_or_ninja_to_be_found(tmp_path):
    run = {
        "run_dir": str(tmp_path / "run"),
        "train": {"packs_per_step": 2, "max_steps": 2, "checkpoint_every": 1},
    }
    code = "from tests.zeta.trainer_jobs import train; import sys, json; "
    code += "sys.exit(train(json.loads(sys.argv[1])))"
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX")}
    environment |= {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", code, json.dumps(run)], env=environment, check=True, timeout=120
    )
    assert (tmp_path / "run" / "FINISHED").exists()
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000002\n"


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node001", "node001"),
        ("a,b", "a"),
        ("a-b[1-2]-ib", "a-b1-ib"),
        ("n[3,5-7]", "n3"),
        ("n[003-120],m[1-2]", "n003"),
        ("rack[2-3]n[04-09]-ib,x", "rack2n04-ib"),
        ("a,b[1-2]", "a"),
    ],
)
def test_the_first_node_of_a_list_is_found_without_tools_of_slurm(monkeypatch, nodelist, first):
    monkeypatch.setenv("PATH", "")
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_NODEID": "0"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": nodelist}
    assert rank_from_environment(step).master_addr == first


def test_ranks_that_a_launcher_has_started_are_its_own_whatever_the_step():
    shell = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "4"}
    started = shell | rank_environment(1, 2, 20100)
    info = rank_from_environment(started)
    assert (info.rank, info.world_size, info.master_port) == (1, 2, 20100)
    left_over = {name: value for name, value in started.items() if name != "ZETA_LAUNCHED_RANKS"}
    assert rank_from_environment(left_over).world_size == 4
