"""Ranks that wait for others say for whom, and leave within seconds when asked."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from tests.zeta.training import free_port
from zeta.distributed import RankInfo
from zeta.exit_codes import ExitCode
from zeta.run.meeting import LeavingError, meet, wait_for, wait_for_ranks
from zeta.run.signals import StopSignals


def after(seconds, number):
    threading.Timer(seconds, os.kill, [os.getpid(), number]).start()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("number", "ending"), [(signal.SIGTERM, LeavingError), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_rank_that_is_asked_to_leave_while_it_waits_does_so(
    capfd, monkeypatch, rank, number, ending
):
    monkeypatch.setattr("zeta.run.meeting._TELL_S", 1.0)
    info = RankInfo(rank=rank, world_size=2, master_port=free_port())
    began = time.monotonic()
    after(1.5, number)
    with StopSignals(interrupts=False), pytest.raises(ending) as left:
        wait_for_ranks(meet(info, 60), info, 60)
    assert time.monotonic() - began < 10
    if number == signal.SIGTERM:
        assert left.value.status == ExitCode.REQUEUE
    if rank == 0:
        assert f"waiting for 1 of 2 ranks at 127.0.0.1:{info.master_port}" in capfd.readouterr().err


def test_a_rank_that_is_asked_to_leave_before_rank_0_is_there_still_meets_it_to_say_so():
    port = free_port()
    first, second = (RankInfo(rank=rank, world_size=2, master_port=port) for rank in range(2))
    with StopSignals(interrupts=False), ThreadPoolExecutor(1) as other:
        os.kill(os.getpid(), signal.SIGTERM)
        late = other.submit(lambda: time.sleep(0.5) or meet(first, 60))
        with pytest.raises(LeavingError):
            wait_for(meet(second, 60), "never", second, 60)
        assert late.result().add("zeta/arrived", 0) == 2


def test_a_step_of_slurm_is_named_with_what_to_type(capfd, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    info = RankInfo(world_size=4, from_slurm=True)
    with pytest.raises(TimeoutError, match="4 of 4 ranks did not come"):
        wait_for(HashStore(), "never", info, 1.3)
    said = capfd.readouterr().err
    assert "waiting for 4 of 4 ranks at 127.0.0.1:0 (job step 77.0)" in said
    assert "env -u SLURM_STEP_NUM_TASKS" in said


def test_an_unknown_first_host_is_named_without_a_stack(capfd):
    info = RankInfo(rank=1, world_size=2, master_addr="no-such-host.invalid", master_port=29511)
    with pytest.raises(ConnectionError, match=r"no-such-host\.invalid.*set MASTER_ADDR"):
        meet(info, 1.0)
    assert capfd.readouterr().err == ""


def test_what_is_there_already_is_not_waited_for():
    store, info = HashStore(), RankInfo()
    store.set("key", "value")
    assert wait_for(store, "key", info, 0)
    assert meet(info, 0).add("zeta/arrived", 0) == 1
