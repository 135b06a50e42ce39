"""The supply of a run, measured in as many processes as it has workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import pytest

from data_pipeline import supply
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.tar_reader import TarError
from data_pipeline.supply import measure_supply
from tests.data_pipeline.synthetic import config, write_shards
from tests.zeta.training import ROOT


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = write_shards(tmp_path / "shards", [60, 60])
    index_shards([str(folder)], workers=1, progress=False)
    return folder


def plan(shards: Path, lanes: int = 2, **settings: object) -> Plan:
    return Plan(Manifest.open(str(shards)), config(workers=0), lanes, **settings)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_as_many_processes_are_measured_as_a_rank_has_workers(shards, workers, monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 8)
    supply = measure_supply(plan(shards), workers=workers, images=40)
    assert supply is not None
    assert supply.processes == max(1, workers)
    assert supply.images > 20  # by the size of the first pack, so about 40
    assert supply.images_per_s > 0
    assert supply.pack.num_images > 0


def test_no_more_processes_are_measured_than_there_are_cores(shards, monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    supply = measure_supply(plan(shards), workers=16, images=20)
    assert supply is not None
    assert supply.processes == 2


def test_few_packs_are_measured_in_fewer_processes_and_one_alone_not_at_all(shards, monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 64)
    few = measure_supply(plan(shards, 1, max_epochs=1), workers=64, images=1)
    assert few is not None
    assert few.processes < 64
    assert measure_supply(_of_one_pack(shards), workers=4) is None


def _of_one_pack(shards: Path) -> Plan:
    roomy = config(workers=0, token_budget=10**6, max_images_per_pack=1000)
    return Plan(Manifest.open(str(shards)), roomy, 1, max_epochs=1)


def test_a_process_that_keeps_the_others_waiting_ends_the_measurement_and_not_the_run(
    shards, monkeypatch
):
    execute = supply.Executor.execute
    calls = multiprocessing.get_context("fork").Value("i", 0)

    def slow_in_the_second(self, recipe, patches=None):
        with calls.get_lock():
            calls.value += 1
            number = calls.value
        if number == 2:  # the first process waits for this one after its own first pack
            time.sleep(2)
        return execute(self, recipe, patches)

    monkeypatch.setattr(supply, "_WAIT_S", 0.5)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 8)
    monkeypatch.setattr(supply.Executor, "execute", slow_in_the_second)
    assert measure_supply(plan(shards), workers=2, images=20) is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_outlive_a_signal_to_all_and_not_the_rank(shards, number, tmp_path):
    """Slurm sends SIGTERM to all processes of a job; a killed rank leaves none behind."""
    script = f"""
import multiprocessing, os, signal, sys, threading, time
from data_pipeline import supply
from tests.data_pipeline.test_supply import plan
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: None)

def tell():
    while len(children := multiprocessing.active_children()) < 2:
        time.sleep(0.05)
    time.sleep(0.5)
    print(*(child.pid for child in children), flush=True)

threading.Thread(target=tell, daemon=True).start()
print(supply.measure_supply(plan(Path({str(shards)!r})), workers=2, images=20_000, seconds=3))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 2
        if number == signal.SIGTERM:
            os.killpg(process.pid, number)
            assert "images_per_s" in process.stdout.read()
            assert process.wait() == 0
            return
        process.send_signal(number)
        process.wait()
        deadline = time.monotonic() + 10
        while any(map(is_running, workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(is_running, workers))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_shard_that_changed_is_said_by_the_process_that_found_it(shards):
    opened = plan(shards)
    for tar in shards.glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[:1024])
    with pytest.raises((TarError, OSError), match="shard"):
        measure_supply(opened, workers=2, images=10)
