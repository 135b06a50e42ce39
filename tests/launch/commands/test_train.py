"""`zeta train` as a process of its own: what it does before there is anything to save."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.shards.build import build_shards
from tests.data_pipeline.shard_fixtures import jpeg
from tests.zeta.training import free_port
from zeta.exit_codes import ExitCode
from zeta.run.directory import RunDir


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)
    return bool(int(caught[1], 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_all_ranks_leave_with_85_if_one_is_told_to_while_it_still_loads_torch(tmp_path):
    samples = [(f"s{i}", {"jpg": jpeg(24, 24, i), "cls": b"0"}) for i in range(12)]
    build_shards(samples, tmp_path / "shards", class_names=["a"])
    run_dir = RunDir(tmp_path / "run")
    command = [sys.executable, "-P", "-m", "launch", "train", "demo"]
    command += [f"data.shards={tmp_path / 'shards'}", f"run.dir={run_dir.path}"]
    command += ["data.workers=0", "tracker.wandb.mode=disabled"]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    told = ranks[1]
    deadline = time.monotonic() + 60
    while not catches(told.pid, signal.SIGUSR1) and time.monotonic() < deadline:
        time.sleep(0.005)
    early = "libtorch" not in Path(f"/proc/{told.pid}/maps").read_text()
    told.send_signal(signal.SIGUSR1)
    said = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [ExitCode.REQUEUE] * 2, said
    assert early  # else the trainer itself was there to note it
    assert not run_dir.finished.exists()
