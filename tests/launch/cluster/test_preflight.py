"""`zeta launch preflight` as two processes that take each other for nodes, without Slurm."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from data_pipeline.shards.build import build_shards
from launch.cluster.preflight import BAD_NODES
from launch.run.lock import RunLock, this_owner
from tests.data_pipeline.shard_fixtures import jpeg
from tests.zeta.training import ROOT, free_port
from zeta.exit_codes import ExitCode
from zeta.run.directory import RunDir

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of shards, and one of other images."""
    folder = tmp_path_factory.mktemp("shards")
    for name, side in (("first", 24), ("later", 32)):
        samples = [(f"s{i}", {"jpg": jpeg(side, 24, i), "cls": b"0"}) for i in range(6)]
        build_shards(samples, folder / name, class_names=["a"])
    return folder


def begin(run_dir, *shards_of_nodes, timeout_s=30, last=("-m", "launch"), **of_last):
    """Begin it on one node for each folder of shards.

    `last`: what Python runs on the last node; `of_last`: more variables of its environment.
    """
    port, nodes = str(free_port()), []
    for rank, shards in enumerate(shards_of_nodes):
        is_last = rank == len(shards_of_nodes) - 1
        there = {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        there |= {"WORLD_SIZE": str(len(shards_of_nodes)), "SLURMD_NODENAME": f"n{rank + 1}"}
        there |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        program = last if is_last else ("-m", "launch")
        command = [sys.executable, "-P", *program, "launch", "preflight", "demo"]
        command += [f"data.shards={shards}", f"run.dir={run_dir}"]
        nodes.append(
            subprocess.Popen(
                [*command, f"cluster.preflight_timeout_s={timeout_s}"],
                env=os.environ | there | {"PYTHONPATH": str(ROOT)} | (of_last if is_last else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return nodes


def preflight(run_dir, *shards_of_nodes):
    """Run it; returns (statuses, outputs, what was said)."""
    return ended(begin(run_dir, *shards_of_nodes))


def ended(nodes):
    """Wait for it; returns (statuses, outputs, what was said)."""
    words = [node.communicate(timeout=120) for node in nodes]
    outputs, said = ([word[i] for word in words] for i in (0, 1))
    return [node.returncode for node in nodes], outputs, "".join(said)


def test_nodes_that_are_well_measure_their_network_and_print_no_answer(shards, tmp_path):
    codes, outputs, said = preflight(tmp_path / "run", shards / "first", shards / "first")
    assert (codes, outputs) == ([0, 0], ["", ""]), said
    assert "2 nodes well, no GPUs" in said
    assert "all-reduce of 16 MiB over 2 nodes: " in said
    assert " GB/s a link" in said
    assert "DeepSpeed" not in said
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"owners"}


def test_a_node_with_other_shards_is_answered_and_listed(shards, tmp_path):
    codes, outputs, said = preflight(tmp_path / "run", shards / "first", shards / "later")
    assert (codes, outputs) == ([BAD_NODES] * 2, ["n2\n", ""]), said
    listed = RunDir(tmp_path / "run").excluded_nodes.read_text()
    assert listed.startswith("n2 ")
    assert "data.shards: it sees other shards" in listed


def test_what_no_node_can_do_is_said_once_and_never_tried_again(shards, tmp_path):
    run_dir = RunDir(tmp_path / "run")
    lock = RunLock(run_dir, this_owner({}, 5.0))
    lock.acquire()
    codes, outputs, said = preflight(run_dir.path, shards / "first", shards / "first")
    assert (codes, outputs) == ([ExitCode.NEVER_RESTART] * 2, ["", ""])
    assert said.count("zeta: error") == 1
    assert "is in use: another run trains there" in said


def test_nodes_that_lose_the_first_one_say_so_in_a_line(shards, tmp_path):
    first, second = begin(tmp_path / "run", shards / "first", shards / "first")
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/owners").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    first.kill()
    first.communicate()
    _, said = second.communicate(timeout=120)
    assert second.returncode == 1
    assert said.count("zeta: error") == 1
    assert "C++" not in said
    assert len(said.splitlines()) < 5, said


def test_a_signal_to_leave_asks_for_a_requeue(shards, tmp_path):
    node, other = begin(tmp_path / "run", shards / "first", shards / "first")
    other.kill()
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/owners").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    node.send_signal(signal.SIGUSR1)
    node.communicate(timeout=60)
    assert node.returncode == ExitCode.REQUEUE


@pytest.mark.parametrize("of_first", [True, False])
def test_a_node_that_waits_for_others_leaves_within_seconds_when_asked(shards, tmp_path, of_first):
    node, other = begin(tmp_path / "run", shards / "first", shards / "first")
    staying, leaving = (node, other) if of_first else (other, node)
    staying.send_signal(signal.SIGSTOP)  # alive, and silent
    try:
        time.sleep(6 if of_first else 4)  # torch is loaded, and it waits
        leaving.send_signal(signal.SIGTERM)
        leaving.communicate(timeout=10)
    finally:
        staying.kill()
        staying.communicate()
    assert leaving.returncode == ExitCode.REQUEUE


DIES_IN_THE_ALL_REDUCE = """
import os, signal, sys
import launch.cluster.network_check
from launch.cli import entry_point
launch.cluster.network_check.timed_all_reduce = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(entry_point())
"""


def test_an_all_reduce_that_fails_names_who_is_missing_or_else_what_each_node_found(
    shards, tmp_path
):
    here, there = tmp_path / "dead", tmp_path / "blind"
    both = [shards / "first"] * 2
    died = begin(here, *both, timeout_s=20, last=("-c", DIES_IN_THE_ALL_REDUCE))
    blind = begin(there, *both, timeout_s=20, GLOO_SOCKET_IFNAME="none0")
    codes, outputs, said = ended(died)
    assert (codes, outputs) == ([BAD_NODES, -signal.SIGKILL], ["n2\n", ""]), said
    assert "node n2 is bad: no answer from it in the all-reduce" in said
    assert RunDir(here).excluded_nodes.read_text().startswith("n2 ")
    codes, outputs, said = ended(blind)
    assert (codes, outputs) == ([1, 1], ["", ""]), said
    (line,) = [line for line in said.splitlines() if "the nodes cannot all-reduce: " in line]
    assert re.search(r"n1: .+; n2: .*none0", line)
    assert not RunDir(there).excluded_nodes.exists()
