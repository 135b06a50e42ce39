"""The packs of a step do not depend on ranks, workers, prefetch or kills."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import joblib
import pytest
import torch

from data_pipeline.config import DataConfig
from data_pipeline.loading.loader import PackLoader, num_workers
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from tests.data_pipeline.synthetic import add_member, config, write_shards
from zeta.packed import StepPacks, merge_states

LANES = 6
STEPS = 9


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = write_shards(tmp_path_factory.mktemp("data") / "shards", [70, 50, 41])
    index_shards([str(folder)], workers=1, progress=False)
    return Manifest.open(str(folder))


def read_steps(
    manifest: Manifest,
    world_size: int,
    steps: int = STEPS,
    state: dict | None = None,
    workers: int = 0,
) -> tuple[list[list[StepPacks]], dict]:
    """Return the steps of each rank, and the merged state after the last one."""
    ranks, states = [], []
    for rank in range(world_size):
        plan = Plan(manifest, config(workers=workers), LANES)
        loader = PackLoader(plan, rank=rank, world_size=world_size)
        ranks.append(list(itertools.islice(loader.steps(state), steps)))
        states.append(loader.state_after(ranks[-1][-1].step))
    return ranks, json.loads(json.dumps(merge_states(states)))


def content(ranks: list[list[StepPacks]]) -> list[list[tuple]]:
    """Return, for each step, the packs of all ranks in lane order, as comparable values."""
    result = []
    for packs_by_rank in zip(*ranks, strict=True):
        lanes = zip(*(step.packs for step in packs_by_rank), strict=True)
        packs = [pack for row in lanes for pack in row][:LANES]
        result.append(
            [
                (
                    pack.lengths,
                    pack.sample_ids.tolist(),
                    pack.coords.tolist(),
                    pack.patches.sum().item(),
                )
                for pack in packs
            ]
        )
    return result


@pytest.fixture(scope="module")
def reference(manifest: Manifest) -> list[list[tuple]]:
    return content(read_steps(manifest, 1)[0])


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 6])
def test_any_world_size_reads_the_same_packs_each_step(manifest, reference, world_size):
    ranks, _ = read_steps(manifest, world_size)
    assert content(ranks) == reference
    assert {len(step.packs) for rank in ranks for step in rank} == {-(-LANES // world_size)}
    for rank, steps in enumerate(ranks):
        for step in steps:
            assert step.lanes == tuple(rank + i * world_size for i in range(len(step.packs)))
            beyond = [p for p, lane in zip(step.packs, step.lanes, strict=True) if lane >= LANES]
            assert all(pack.num_images == 0 for pack in beyond)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_reads_the_same_packs(manifest, reference, workers):
    ranks, _ = read_steps(manifest, 1, workers=workers)
    assert content(ranks) == reference


@pytest.mark.parametrize(
    ("before", "after", "killed_at"), [(1, 1, 1), (2, 3, 4), (3, 2, 5), (6, 1, 8)]
)
def test_a_run_restored_at_any_world_size_goes_on_exactly(
    manifest, reference, before, after, killed_at
):
    _, state = read_steps(manifest, before, steps=killed_at, workers=1)
    ranks, _ = read_steps(manifest, after, STEPS - killed_at, state)
    assert ranks[0][0].step == killed_at
    assert content(ranks) == reference[killed_at:]


def test_a_run_by_epochs_sees_each_image_once_an_epoch_and_ends(manifest):
    plan = Plan(manifest, config(), LANES, max_epochs=2)
    seen: list[int] = []
    for step in PackLoader(plan).steps(None):
        for pack in step.packs:
            seen += pack.sample_ids[pack.weights > 0].tolist()
        if not step.more:
            break
    assert sorted(seen) == sorted(list(range(161)) * 2)


def test_a_pack_is_laid_out_as_the_contract_says(manifest):
    plan = Plan(manifest, config(prefix_tokens=2), LANES)
    for pack in next(PackLoader(plan).steps(None)).packs:
        bounds = pack.cu_seqlens.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == 256 == pack.patches.shape[0]
        assert [b - a for a, b in itertools.pairwise(bounds)] == list(pack.lengths)
        for i in range(32):
            rows = slice(bounds[i], bounds[i + 1])
            if pack.weights[i] == 0:
                assert pack.lengths[i] == 0
                assert pack.sample_ids[i] == -1
                continue
            assert pack.labels[i] == pack.sample_ids[i] % 2
            y, x = pack.coords[rows][2:].unbind(1)
            height, width = pack.grids[i].tolist()
            index = y * width + x
            assert (index.diff() > 0).all()
            assert y.max() < height
            assert x.max() < width
            assert (pack.coords[rows][:2] == -1).all()
            assert (pack.patches[rows][:2] == 0).all()
        tail = slice(bounds[-2], bounds[-1])
        assert (pack.patches[tail] == 0).all()
        assert (pack.coords[tail] == -1).all()


def test_a_bad_image_costs_its_own_slot_only(tmp_path: Path, manifest):
    folder = write_shards(tmp_path / "shards", [70, 50, 41])
    index_shards([str(folder)], workers=1, progress=False)
    good = read_first_steps(folder, 4)
    row = Manifest.open(str(folder)).samples[77]
    shard = folder / "shard-001.tar"
    status = shard.stat()
    with shard.open("r+b") as stream:  # damage one JPEG behind the index's back
        stream.seek(int(row["offset"]) + 512 + 200)
        stream.write(b"\xff\xd9" * 40)
    import os

    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    damaged = read_first_steps(folder, 4)
    rejected = [r for step in damaged for r in step.rejected]
    assert {r.sample_id for r in rejected} == {77}  # once in each epoch that the steps reach
    assert rejected[0].key == "s00077"
    assert "shard-001.tar" in rejected[0].shard
    for a, b in zip(good, damaged, strict=True):
        lost = sum(
            length
            for pack in b.packs
            for length, weight, sample in zip(
                pack.lengths, pack.weights, pack.sample_ids, strict=False
            )
            if weight == 0 and sample >= 0
        )
        assert b.num_tokens == a.num_tokens - lost  # what was not decoded was not seen
        for pack, other in zip(a.packs, b.packs, strict=True):
            assert pack.lengths == other.lengths
            same = torch.ones(256, dtype=torch.bool)
            for i, sample_id in enumerate(pack.sample_ids.tolist()):
                if sample_id == 77:
                    same[pack.cu_seqlens[i] : pack.cu_seqlens[i + 1]] = False
                    assert (pack.weights[i], other.weights[i]) == (1, 0)
            assert (pack.patches[same] == other.patches[same]).all()
            assert (pack.coords == other.coords).all()


def read_first_steps(folder: Path, steps: int) -> list[StepPacks]:
    plan = Plan(Manifest.open(str(folder)), config(), LANES)
    return list(itertools.islice(PackLoader(plan).steps(None), steps))


def test_a_sample_without_a_label_is_not_planned_where_labels_are_needed(tmp_path: Path):
    import io
    import tarfile

    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (40, 40)).save(stream, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_member(tar, "x.png", stream.getvalue())
        add_member(tar, "y.png", stream.getvalue())
        add_member(tar, "y.cls", b"1")
    index_shards([str(tmp_path)], workers=1, progress=False)
    manifest = Manifest.open(str(tmp_path))
    for required, ids in ((True, {1}), (False, {0, 1})):
        plan = Plan(manifest, config(require_labels=required), 1, max_epochs=1)
        step = next(PackLoader(plan).steps(None))
        assert set(step.packs[0].sample_ids.tolist()) - {-1} == ids


def test_more_ranks_than_lanes_are_refused(manifest):
    with pytest.raises(ValueError, match=r"7 ranks but train\.packs_per_step is 6"):
        PackLoader(Plan(manifest, config(), LANES), rank=0, world_size=7)


def test_a_state_of_other_shards_is_refused(manifest, tmp_path):
    _, state = read_steps(manifest, 1, steps=1)
    folder = write_shards(tmp_path / "other", [60, 60], seed=5)
    index_shards([str(folder)], workers=1, progress=False)
    loader = PackLoader(Plan(Manifest.open(str(folder)), config(), LANES))
    with pytest.raises(ValueError, match="not the shards that this run was started on"):
        next(loader.steps(state))


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not tell who sent a signal")
def test_a_worker_is_ended_by_its_rank_and_by_no_other_process(manifest):
    """Slurm sends SIGTERM to the workers of a preempted job too, while the rank is to save."""
    before = set(multiprocessing.active_children())
    loader = PackLoader(Plan(manifest, config(workers=1), 2))
    steps = loader.steps(None)
    next(steps)
    (worker,) = set(multiprocessing.active_children()) - before
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    for _ in range(20):  # more than were prefetched
        next(steps)
    assert worker.exitcode is None
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 1), (16, 15)])
def test_a_loop_of_ones_own_gets_the_cores_of_its_process_but_one(cores, workers, monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: cores)
    assert num_workers(DataConfig()) == workers
    assert num_workers(DataConfig(workers=0)) == 0


@pytest.mark.parametrize(("workers", "packs"), [(1, 5), (2, 4), (3, 4), (4, 4)])
def test_the_workers_are_asked_for_the_packs_of_a_whole_step_ahead(manifest, workers, packs):
    loader = PackLoader(Plan(manifest, config(workers=workers), 8), rank=1, world_size=2)
    assert loader.prefetch == packs
    assert loader.prefetch * workers >= 4


def test_packs_that_wait_take_no_more_than_their_share_of_memory(manifest):
    large = config(workers=2, token_budget=2_000_000)
    assert PackLoader(Plan(manifest, large, LANES)).prefetch == 4
