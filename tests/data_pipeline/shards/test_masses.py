"""Shard masses are counted right, cached by everything they depend on, in level memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.shards import masses as masses_module
from data_pipeline.shards.manifest import SampleFlag
from data_pipeline.shards.masses import Needs, shard_masses
from tests.data_pipeline.synthetic import synthetic_manifest


def count(samples):
    patches = samples["height"].astype(np.int64)
    return np.minimum(patches, 150), patches > 150


@pytest.mark.parametrize("chunk", [1 << 17, 7, 30])
def test_every_sample_of_every_shard_is_counted_as_one_thing(chunk, monkeypatch):
    monkeypatch.setattr(masses_module, "_CHUNK", chunk)
    manifest = synthetic_manifest([30, 1, 69])
    samples = manifest.samples
    samples["flags"][[2, 40]] |= np.uint8(SampleFlag.BAD)
    samples["label"][[2, 50]] = -1
    masses = shard_masses(manifest, count, needs=Needs(label=True), rules={})
    assert masses.bad.tolist() == [1, 0, 1]
    assert masses.unlabelled.tolist() == [0, 0, 1]
    assert (masses.usable + masses.bad + masses.unlabelled).tolist() == [30, 1, 69]
    usable = np.setdiff1d(np.arange(100), [2, 40, 50])
    assert masses.tokens.sum() == np.minimum(samples["height"][usable], 150).sum()
    assert masses.shrunk.sum() == (samples["height"][usable] > 150).sum()


def test_what_a_sample_needs_is_a_class_a_list_of_them_or_a_caption():
    manifest = synthetic_manifest([4, 4])
    samples = manifest.samples
    samples["label"] = -1
    samples["label"][:3] = 0
    samples["flags"][:5] |= np.uint8(SampleFlag.LABELLED)  # two of them with an empty list
    samples["flags"][[0, 7]] |= np.uint8(SampleFlag.CAPTIONED)
    samples["flags"][7] |= np.uint8(SampleFlag.BAD)
    for needs, usable in (
        (Needs(), 7),
        (Needs(label=True), 3),
        (Needs(label_list=True), 5),
        (Needs(caption=True), 1),
    ):
        assert shard_masses(manifest, count, needs=needs, rules={}).usable.sum() == usable


def test_the_cache_is_used_only_for_the_same_shards_and_rules(tmp_path: Path):
    manifest, calls = synthetic_manifest([10, 20]), []

    def counted(samples):
        calls.append(len(samples))
        return count(samples)

    def masses(labels: bool = False, **rules: object):
        return shard_masses(
            manifest, counted, needs=Needs(label=labels), rules=rules, cache=tmp_path / "cache"
        )

    first = masses(patch=16)
    again = masses(patch=16)
    assert len(calls) == 1
    assert (first.tokens == again.tokens).all()
    masses(patch=14)
    masses(labels=True, patch=16)
    assert len(calls) == 3
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"damaged")
    assert (masses(patch=16).tokens == first.tokens).all()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    masses = shard_masses(
        synthetic_manifest([5]), count, needs=Needs(), rules={}, cache=tmp_path / "file"
    )
    assert masses.usable.tolist() == [5]


PEAK = """
import sys
import numpy as np
from data_pipeline.config import DataConfig, ResolutionConfig
from data_pipeline.shards.manifest import SAMPLE_DTYPE, Manifest, Shard
from data_pipeline.plan.plan import Plan

count, path = int(sys.argv[1]), sys.argv[2]
rows = np.lib.format.open_memmap(path, "w+", dtype=SAMPLE_DTYPE, shape=(count,))
for start in range(0, count, 100_000):
    rows[start : start + 100_000]["height"] = 300
    rows[start : start + 100_000]["width"] = 400
rows.flush()
del rows
samples = np.load(path, mmap_mode="r")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
shards = tuple(Shard(str(i), 1, 0, i * 10_000, 10_000) for i in range(count // 10_000))
config = DataConfig(
    token_budget=4096, resolution=ResolutionConfig("native", max=512), patch_size=16, cost_dim=768
)
plan = Plan(Manifest(shards, samples, None, "x"), config, 8)
for index in range(8):
    lane = plan.lane(index)
    for _ in range(500):
        lane.next_pack()
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_the_planner_does_not_grow_with_the_data(tmp_path: Path):
    def peak_mib(count: int) -> float:
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(count), str(tmp_path / f"{count}.npy")],
            capture_output=True,
            text=True,
            check=True,
            env={"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[3],
        )
        return float(done.stdout)

    # 8 million rows are 192 MB; what may grow is the list of shards.
    assert peak_mib(8_000_000) - peak_mib(800_000) < 48
