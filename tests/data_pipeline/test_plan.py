"""The plan is exact: every image once an epoch, restored anywhere, within its budget."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.config import DropConfig, ResolutionConfig
from data_pipeline.manifest import SampleFlag
from data_pipeline.plan import LaneState, Plan
from data_pipeline.plan_summary import summarise
from tests.data_pipeline.synthetic import config, synthetic_manifest


def pack_key(pack) -> list[tuple[int, ...]]:
    columns = (pack.sample_ids, pack.epochs, pack.rows, pack.columns, pack.keep, pack.lengths)
    return [tuple(map(int, row)) for row in zip(*columns, strict=True)]


def test_each_epoch_packs_every_usable_sample_exactly_once():
    manifest = synthetic_manifest([37, 90, 61])
    manifest.samples["flags"][[5, 100]] |= np.uint8(SampleFlag.BAD)
    plan = Plan(manifest, config(), num_lanes=4, max_epochs=3)
    packs = [pack for lane in range(4) for pack in plan.lane(lane)]
    seen = [
        pair
        for pack in packs
        for pair in zip(pack.epochs.tolist(), pack.sample_ids.tolist(), strict=True)
    ]
    usable = [i for i in range(188) if i not in (5, 100)]
    assert sorted(seen) == [(epoch, i) for epoch in range(3) for i in usable]


def test_every_pack_keeps_within_budget_and_image_limit():
    plan = Plan(
        synthetic_manifest([300]), config(prefix_tokens=1, max_images_per_pack=9), 2, max_epochs=2
    )
    for pack in plan.lane(0):
        assert pack.lengths.sum() <= 256
        assert len(pack.lengths) <= 9
        assert (pack.lengths == pack.keep + 1).all()
        assert (pack.keep <= pack.rows * pack.columns).all()


def test_a_lane_restored_after_any_pack_goes_on_with_the_next():
    plan = Plan(synthetic_manifest([80, 75]), config(pack_window=32), num_lanes=2, max_epochs=3)
    lane, packs, states = plan.lane(1), [], [LaneState()]
    while (pack := lane.next_pack()) is not None:
        packs.append(pack_key(pack))
        states.append(LaneState.from_json(lane.state.to_json()))
    assert len(packs) > 12
    for position, state in enumerate(states):
        restored = plan.lane(1, state)
        assert [pack_key(pack) for pack in restored] == packs[position:]


def test_looking_ahead_changes_neither_packs_nor_state():
    plan = Plan(synthetic_manifest([80]), config(pack_window=16), num_lanes=1, max_epochs=2)
    looking, plain = plan.lane(0), plan.lane(0)
    while (pack := plain.next_pack()) is not None:
        assert looking.has_more()
        assert pack_key(looking.next_pack()) == pack_key(pack)
        assert looking.state == plain.state
    assert not looking.has_more()


def test_a_budget_no_patch_fits_into_is_refused():
    with pytest.raises(ValueError, match=r"data.token_budget is 2.*at least 3"):
        Plan(synthetic_manifest([9]), config(token_budget=2, prefix_tokens=2), 1)


def test_a_manifest_without_enough_usable_samples_is_refused():
    manifest = synthetic_manifest([10])
    manifest.samples["flags"][:8] |= np.uint8(SampleFlag.BAD)
    with pytest.raises(ValueError, match=r"packs_per_step is 4 .* only 2"):
        Plan(manifest, config(), num_lanes=4)


def test_the_summary_is_what_the_lanes_do():
    manifest = synthetic_manifest([400, 300, 324])
    plan = Plan(manifest, config(), num_lanes=4, max_epochs=1)
    packs = [pack for lane in range(4) for pack in plan.lane(lane)]
    summary = summarise(Plan(manifest, config(), num_lanes=4))
    assert summary.images == 1024
    assert summary.tokens == sum(int(pack.lengths.sum()) for pack in packs)
    drops = np.concatenate([1 - pack.keep / (pack.rows * pack.columns) for pack in packs])
    assert summary.drop_mean == pytest.approx(drops.mean())
    # A run that ends with the epoch closes up to two packs a lane before they are full.
    assert len(packs) - 2 * 4 <= summary.packs <= len(packs)
    assert summary.steps_per_epoch == pytest.approx(summary.packs / 4, abs=1)
    assert 0.98 < summary.fill <= 1


def test_empty_packs_of_missing_lanes_count_as_padding():
    plan = Plan(synthetic_manifest([1000]), config(), num_lanes=4)
    assert summarise(plan, 3).fill == pytest.approx(summarise(plan, 1).fill * 4 / 6)
    assert summarise(plan, 1).straggler_ratio == 1
    assert summarise(plan, 4).straggler_ratio > 1


def test_the_floors_of_fill_hold_on_photo_like_sizes():
    manifest = synthetic_manifest([4096] * 2, seed=3)
    manifest.samples["height"] *= 4
    manifest.samples["width"] *= 4
    cases = (
        (4096, ResolutionConfig("side", 64, 512), DropConfig("none"), 0.995),
        (1024, ResolutionConfig("side", 64, 256), DropConfig("constant", rate=0.5), 0.985),
    )
    for budget, resolution, drop, floor in cases:
        data = config(
            token_budget=budget, resolution=resolution, drop=drop, patch_size=16, cost_dim=768
        )
        assert summarise(Plan(manifest, data, num_lanes=2)).fill >= floor
