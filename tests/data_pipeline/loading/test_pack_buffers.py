"""Slots of shared memory: a pack that came back lies in its slot as long as anything uses it."""

from __future__ import annotations

import itertools

import pytest
import torch

from data_pipeline.loading.executor import ExecutedPack, Executor
from data_pipeline.loading.loader import PackLoader
from data_pipeline.loading.pack_buffers import PackBuffers
from data_pipeline.loading.recipe import pack_recipe
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from tests.data_pipeline.synthetic import config, write_shards

LANES = 3


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = write_shards(tmp_path_factory.mktemp("data") / "shards", [60, 40])
    index_shards([str(folder)], workers=1, progress=False)
    return Manifest.open(str(folder))


def through(buffers: PackBuffers, slot: int, manifest: Manifest) -> tuple[ExecutedPack, ...]:
    """Return a pack as it was made in a slot, and as it comes back."""
    plan = Plan(manifest, config(workers=0), LANES)
    recipe = pack_recipe(plan, plan.lane(slot).next_pack(), 0)
    executor = Executor(manifest.class_names, 10)
    made = buffers.strip(slot, executor.execute(recipe, buffers.patches(slot)))
    return executor.execute(recipe), buffers.join(slot, made)


def buffers_for(manifest: Manifest, slots: int) -> PackBuffers:
    plan = Plan(manifest, config(workers=0), LANES)
    return PackBuffers(slots, plan.config.token_budget, 3 * plan.patch_size**2)


def test_a_pack_comes_back_through_its_slot_as_it_was_made(manifest):
    buffers = buffers_for(manifest, 2)
    for slot in range(2):
        alone, back = through(buffers, slot, manifest)
        for name, tensor in alone.batch.tensors().items():
            assert torch.equal(getattr(back.batch, name), tensor), name


@pytest.mark.parametrize(
    "part",
    [
        lambda batch: batch,
        lambda batch: batch.patches[3:5],
        lambda batch: batch.coords.view(-1)[1:],
        lambda batch: batch.patches.numpy(),
    ],
)
def test_a_slot_is_taken_again_only_when_nothing_of_its_pack_is_left(manifest, part):
    buffers = buffers_for(manifest, 1)
    slot = buffers.take()
    kept = part(through(buffers, slot, manifest)[1].batch)
    assert buffers.take() is None
    del kept
    assert buffers.take() == slot


def test_a_pack_let_go_before_older_ones_gives_its_slot(manifest):
    buffers = buffers_for(manifest, 2)
    older, newer = (through(buffers, buffers.take(), manifest)[1] for _ in range(2))
    assert buffers.take() is None
    del newer
    assert buffers.take() is not None
    assert older.batch.num_images


def asked(manifest: Manifest, monkeypatch: pytest.MonkeyPatch, keep: int) -> list[int | None]:
    """Return the slots that a loader took in 30 steps, of which the newest `keep` are kept."""
    taken: list[int | None] = []
    take = PackBuffers.take
    monkeypatch.setattr(PackBuffers, "take", lambda self: taken.append(take(self)) or taken[-1])
    kept: list[object] = []
    source = PackLoader(Plan(manifest, config(workers=1), LANES)).steps(None)
    for step in itertools.islice(source, 30):
        kept = [*kept, step][-keep:]
    source.close()
    return taken


def test_training_that_lets_its_steps_go_always_has_a_slot(manifest, monkeypatch):
    taken = asked(manifest, monkeypatch, keep=1)
    assert None not in taken
    assert len(taken) > 3 * len(set(taken))


def test_a_loop_that_keeps_its_steps_runs_out_of_slots_and_goes_on(manifest, monkeypatch):
    assert None in asked(manifest, monkeypatch, keep=30)
