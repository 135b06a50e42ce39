"""Any world size, any number of workers and any kill point read the same packs: a property test."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.loader import PackLoader
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from tests.data_pipeline.synthetic import config, write_shards
from zeta.packed import StepPacks, merge_states

LANES = 6
STEPS = 10
Step = list[tuple[list[int], list[list[int]], list[list[int]]]]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = write_shards(tmp_path_factory.mktemp("data") / "shards", [70, 50, 41])
    index_shards([str(folder)], workers=1, progress=False)
    return Manifest.open(str(folder))


def read(
    manifest: Manifest, world_size: int, workers: int, steps: int, state: dict | None
) -> tuple[list[Step], dict | None]:
    """Return ids, sizes and kept patches of each lane at each step, and the state after them."""
    ranks, states = list[list[StepPacks]](), []
    for rank in range(world_size):
        plan = Plan(manifest, config(workers=workers, pack_window=24), LANES)
        loader = PackLoader(plan, rank=rank, world_size=world_size)
        ranks.append(list(itertools.islice(loader.steps(state), steps)))
        states.append(loader.state_after(ranks[-1][-1].step))
    read_steps = []
    for packs_by_rank in zip(*ranks, strict=True):
        by_lane = zip(*(step.packs for step in packs_by_rank), strict=True)
        packs = [pack for row in by_lane for pack in row][:LANES]
        read_steps.append(
            [(p.sample_ids.tolist(), p.grids.tolist(), p.coords.tolist()) for p in packs]
        )
    return read_steps, json.loads(json.dumps(merge_states(states)))


@pytest.fixture(scope="module")
def reference(manifest: Manifest) -> list[Step]:
    return read(manifest, 1, 0, STEPS, None)[0]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    workers=st.sampled_from([0, 0, 0, 1, 2]),
    data=st.data(),
)
def test_kills_world_sizes_and_workers_leave_every_step_as_it_is(
    manifest, reference, sizes, workers, data
):
    done, state = list[Step](), None
    for attempt, world_size in enumerate(sizes):
        left = STEPS - len(done)
        last = attempt == len(sizes) - 1
        steps = left if last else data.draw(st.integers(1, max(1, left - 1)))
        if steps < 1 or left < 1:
            break
        some, state = read(manifest, world_size, workers, steps, state)
        done += some
    assert done == reference[: len(done)]
    assert max(len(json.dumps(lane)) for lane in state["lanes"].values()) <= 1024
