"""The plan is exact: every image once an epoch, restored anywhere, within its budget."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import DropConfig, ResolutionConfig
from data_pipeline.plan.lanes import Cursor
from data_pipeline.plan.plan import LaneState, Plan
from data_pipeline.plan.summary import summarise
from data_pipeline.shards.manifest import Manifest, SampleFlag
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


@pytest.mark.parametrize("share", [0.0, 0.4, 0.6])
@pytest.mark.parametrize("window", [16, 4096])
def test_packing_the_next_window_ahead_changes_neither_packs_nor_state(share, window):
    plan = Plan(synthetic_manifest([80, 75]), config(pack_window=window), 2, max_epochs=3)
    plain, ahead = plan.lane(1), plan.lane(1)
    packed = 0
    while (pack := plain.next_pack()) is not None:
        assert pack_key(ahead.next_pack()) == pack_key(pack)
        before = ahead._ahead
        ahead.plan_ahead(share)
        packed += before is None and ahead._ahead is not None
        assert ahead.state == plain.state
        assert ahead.epoch == plain.epoch
        assert ahead.has_more() == plain.has_more()
    assert ahead.next_pack() is None
    assert packed


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


def test_an_epoch_of_less_than_half_a_pack_counts_one():
    summary = summarise(Plan(synthetic_manifest([2]), config(token_budget=100_000), num_lanes=1))
    assert summary.tokens < 50_000
    assert (summary.packs, summary.steps_per_epoch) == (1, 1)


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


@settings(max_examples=40, deadline=None)
@given(
    shard_counts=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    lanes=st.integers(1, 6),
    window=st.integers(1, 70),
    budget=st.sampled_from([32, 256, 1024]),
    max_images=st.integers(1, 40),
    kill=st.integers(0, 60),
    seed=st.integers(0, 5),
)
def test_any_plan_is_exact_from_any_kill_point(
    shard_counts, lanes, window, budget, max_images, kill, seed
):
    if sum(shard_counts) < lanes:
        return
    data = config(
        pack_window=window, token_budget=budget, max_images_per_pack=max_images, seed=seed
    )
    plan = Plan(synthetic_manifest(shard_counts, seed), data, lanes, max_epochs=2)
    seen = []
    for index in range(lanes):
        whole = [pack_key(pack) for pack in plan.lane(index)]
        lane, packs = plan.lane(index), []
        for _ in range(kill):
            if (pack := lane.next_pack()) is not None:
                packs.append(pack_key(pack))
        text = json.dumps(lane.state.to_json())
        assert len(text) <= 1024
        restored = plan.lane(index, LaneState.from_json(json.loads(text)))
        assert packs + [pack_key(pack) for pack in restored] == whole
        seen += [(epoch, sample) for pack in whole for sample, epoch, *_ in pack]
    samples = range(sum(shard_counts))
    assert sorted(seen) == [(epoch, sample) for epoch in range(2) for sample in samples]


@pytest.mark.parametrize("window", [16, 300])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (None, 3), (3, 5)])
def test_another_limit_of_epochs_loses_and_repeats_nothing_from_any_kill_point(
    window, before, after
):
    manifest = synthetic_manifest([60, 40, 50])
    short, long = (
        Plan(manifest, config(pack_window=window), 2, max_epochs=epochs)
        for epochs in (before, after)
    )
    for kill in range(26):
        seen = []
        for index in range(2):
            lane = short.lane(index)
            packs = [pack for _ in range(kill) if (pack := lane.next_pack()) is not None]
            state = LaneState.from_json(json.loads(json.dumps(lane.state.to_json())))
            packs += list(long.lane(index, state))
            seen += [pair for p in packs for pair in zip(p.epochs, p.sample_ids, strict=True)]
        first = sorted((int(e), int(i)) for e, i in seen if e < 3)
        assert first == [(epoch, sample) for epoch in range(3) for sample in range(150)]


def test_the_state_of_a_lane_stays_below_one_kilobyte_at_any_number_of_leftovers():
    marks = np.random.default_rng(0).random(4096) < 0.5
    carry = tuple(np.flatnonzero(marks).tolist())
    cursors = (Cursor(12_345, 123_456, 12_345, 10**11, 10**13),) * 4
    state = LaneState(cursors, 4096, carry, 10**9, 4000)
    text = json.dumps(state.to_json())
    assert len(text) <= 1024
    assert LaneState.from_json(json.loads(text)) == state


def test_a_single_shard_is_dealt_anew_each_epoch():
    plan = Plan(synthetic_manifest([400]), config(), num_lanes=4)
    mix = plan.lane_mix(0)
    epochs, cursors = [], mix.first_cursors()
    for _ in range(3):
        dealt, cursors = mix.deal(cursors, 4096)
        epochs.append(set(dealt.sample_ids.tolist()))
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(epochs[0] | epochs[1] | epochs[2]) > 150


def test_samples_without_the_label_that_is_needed_are_not_planned_but_counted():
    manifest = synthetic_manifest([50, 50])
    manifest.samples["label"][[4, 70]] = -1
    manifest.samples["flags"][[9]] |= np.uint8(SampleFlag.BAD)
    for required, missing in ((True, {4, 9, 70}), (False, {9})):
        plan = Plan(manifest, config(require_labels=required), num_lanes=2, max_epochs=1)
        seen = {i for lane in range(2) for pack in plan.lane(lane) for i in pack.sample_ids}
        assert set(range(100)) - seen == missing
        assert plan.num_images == 100 - len(missing)
    without = synthetic_manifest([20])
    without.samples["label"] = -1
    with pytest.raises(ValueError, match=r"none of the 20 images .* has the class label"):
        Plan(without, config(require_labels=True), num_lanes=2)
    rejected = summarise(Plan(manifest, config(require_labels=True), num_lanes=2)).rejected
    assert rejected == {"unusable, see manifest_rejected.jsonl": 1, "no label": 2}


def test_images_that_were_shrunk_to_fit_are_counted():
    manifest = synthetic_manifest([100])
    manifest.samples["height"], manifest.samples["width"] = 40, 40
    manifest.samples["height"][:7] = manifest.samples["width"][:7] = 400
    data = config(resolution=ResolutionConfig("native", max=1000), drop=DropConfig("none"))
    assert summarise(Plan(manifest, data, num_lanes=2)).shrunk == 7


def test_lanes_with_less_than_a_pack_an_epoch_are_counted():
    assert summarise(Plan(synthetic_manifest([40]), config(), num_lanes=20)).short_lanes > 15
    assert summarise(Plan(synthetic_manifest([4000]), config(), num_lanes=4)).short_lanes == 0


def test_the_estimate_for_large_sets_agrees_with_the_exact_summary():
    plan = Plan(synthetic_manifest([5000] * 8), config(pack_window=512), num_lanes=4)
    exact, estimate = summarise(plan, 4), summarise(plan, 4, exact_up_to=1000)
    assert (exact.approximate, estimate.approximate) == (False, True)
    assert estimate.images == exact.images
    for name in ("tokens", "packs", "steps_per_epoch", "images_per_pack", "drop_mean"):
        assert getattr(estimate, name) == pytest.approx(getattr(exact, name), rel=0.03)
    assert estimate.fill == pytest.approx(exact.fill, abs=0.005)
    assert estimate.straggler_ratio == pytest.approx(exact.straggler_ratio, abs=0.02)


def native_plan(manifest: Manifest) -> Plan:
    data = config(
        token_budget=16384,
        max_images_per_pack=256,
        resolution=ResolutionConfig("native", max=1024),
        drop=DropConfig("none"),
        patch_size=16,
        cost_dim=1024,
        pack_window=2048,
    )
    return Plan(manifest, data, num_lanes=64)


def photo_sizes() -> np.ndarray:
    path = Path(__file__).parents[2] / "benchmarks/image_sizes.csv"
    rows = list(csv.reader(path.open()))[1:]
    return np.array(rows, dtype=np.int64)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["photos", "lognormal", "few large", "half large", "web"])
def test_ranks_wait_little_for_each_other_and_packs_are_full(sizes):
    rng = np.random.default_rng(11)
    manifest = synthetic_manifest([2200] * 96, seed=5)
    n = len(manifest.samples)
    if sizes == "photos":
        width, height = photo_sizes()[rng.integers(0, 500, n)].T
    elif sizes == "lognormal":
        sides = np.exp(rng.normal(6.4, 0.7, n)).clip(16, 8000)
        aspect = np.exp(rng.normal(0, 0.3, n))
        width, height = (sides * aspect).astype(np.int64), (sides / aspect).astype(np.int64)
    elif sizes == "web":  # a few usual sizes, as in COCO, whose lengths are coarse
        usual = np.array([(640, 480), (640, 427), (480, 640), (500, 375), (612, 612), (640, 0)])
        width, height = usual[rng.choice(6, n, p=[0.25, 0.3, 0.15, 0.12, 0.05, 0.13])].T
        height = np.where(height == 0, rng.integers(200, 640, n), height)
    else:
        large = rng.random(n) < (0.05 if sizes == "few large" else 0.5)
        width = height = np.where(large, 1024, rng.integers(120, 400, n))
    manifest.samples["width"], manifest.samples["height"] = width, height
    summary = summarise(native_plan(manifest), world_size=64)
    assert summary.straggler_ratio <= 1.03
    assert summary.fill >= 0.995


@pytest.mark.slow
def test_planning_is_fast_and_a_late_restore_immediate():
    manifest = synthetic_manifest([2500] * 400, seed=5)
    sizes = photo_sizes()[np.random.default_rng(1).integers(0, 500, len(manifest.samples))]
    manifest.samples["width"], manifest.samples["height"] = sizes.T
    plan = native_plan(manifest)
    lane, images, started = plan.lane(0), 0, time.process_time()
    while images < 200_000:
        images += len(lane.next_pack().lengths)
    # The floor is 100,000 a second; half of it here, for busy machines.
    assert images / (time.process_time() - started) > 50_000
    state = replace(lane.state, step=1_000_000 - lane.state.packs_taken)
    late = replace(state, origin=(state.origin[0]._replace(epoch=1400),))
    started = time.process_time()
    restored = plan.lane(0, late)
    assert restored.next_pack() is not None
    assert time.process_time() - started < 2
