"""The supply of a run, measured in as many processes as it has workers."""

from __future__ import annotations

from pathlib import Path

import joblib
import pytest

from data_pipeline.plan.plan import Plan
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.tar_reader import TarError
from data_pipeline.supply import measure_supply
from tests.data_pipeline.synthetic import config, write_shards


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


def test_a_shard_that_changed_is_said_by_the_process_that_found_it(shards):
    opened = plan(shards)
    for tar in shards.glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[:1024])
    with pytest.raises((TarError, OSError), match="shard"):
        measure_supply(opened, workers=2, images=10)
