"""Weighted sources are mixed exactly, each with its own epochs, and restored anywhere."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.plan.lanes import Cursor
from data_pipeline.plan.mixing import Dealt, LaneMix
from data_pipeline.plan.plan import LaneState, Plan
from data_pipeline.plan.summary import summarise
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest, WeightedSource
from data_pipeline.shards.weighted import open_shards
from tests.data_pipeline.synthetic import config, synthetic_manifest, write_shards

LANES = 2
WEIGHTS = (3.0, 1.0, 0.5)
SHARDS = [100, 150, 80, 90, 60]  # two shards of source 0, two of 1, one of 2


def mixed(weights=WEIGHTS) -> Manifest:
    a, b, c = weights
    sources = (
        WeightedSource("a", 0, 2, a),
        WeightedSource("b", 2, 4, b),
        WeightedSource("c", 4, 5, c),
    )
    manifest = synthetic_manifest(SHARDS)
    manifest.samples["height"][330:] *= 2  # sources differ in tokens, not only in images
    return replace(manifest, sources=sources)


def deal(mix: LaneMix, count: int) -> tuple[Dealt, tuple[Cursor, ...]]:
    """Deal exactly `count` samples from the start."""
    parts, cursors = list[Dealt](), mix.first_cursors()
    while (left := count - sum(len(part.sample_ids) for part in parts)) > 0:
        part, cursors = mix.deal(cursors, left)
        parts.append(part)
    return Dealt(*(np.concatenate(column) for column in zip(*parts, strict=True))), cursors


def test_a_pack_mixes_few_epochs_of_a_small_source():
    plan = Plan(mixed(), config(), LANES)
    for pack in itertools.islice(plan.lane(0), 40):
        source = plan.source_of(pack.sample_ids)
        for index in range(3):
            epochs = pack.epochs[source == index]
            assert len(epochs) == 0 or np.ptp(epochs) <= 2


def test_at_every_point_each_source_has_its_share_to_one_image():
    plan = Plan(mixed(), config(), LANES)
    mix = plan.lane_mix(1)
    dealt, _ = deal(mix, 2000)
    source = plan.source_of(dealt.sample_ids)
    counts = np.cumsum(source[:, None] == np.arange(3), axis=0)
    expected = np.arange(1, 2001)[:, None] * np.array(WEIGHTS) / sum(WEIGHTS)
    assert np.abs(counts - expected).max() <= 1
    assert dealt.seen.tolist() == list(range(0, 2000 * LANES, LANES))


def test_the_order_does_not_depend_on_how_much_is_dealt_at_a_time():
    mix = Plan(mixed(), config(), LANES).lane_mix(0)
    whole, _ = deal(mix, 300)
    cursors, ids = mix.first_cursors(), list[int]()
    while len(ids) < 300:
        part, cursors = mix.deal(cursors, 7)
        ids += part.sample_ids.tolist()
    assert ids[:300] == whole.sample_ids.tolist()


def test_weights_by_tokens_are_shares_of_tokens():
    plan = Plan(mixed(), config(mix_by="tokens"), LANES)
    lane, tokens, images = plan.lane(0), np.zeros(3), 0
    while images < 6_000:
        pack = lane.next_pack()
        tokens += np.bincount(plan.source_of(pack.sample_ids), weights=pack.lengths, minlength=3)
        images += len(pack.lengths)
    assert tokens / tokens.sum() == pytest.approx(np.array(WEIGHTS) / sum(WEIGHTS), abs=2e-3)


@pytest.mark.parametrize("mix_by", ["images", "tokens"])
def test_each_source_deals_each_sample_once_in_each_of_its_own_epochs(mix_by):
    plan = Plan(mixed(), config(mix_by=mix_by), LANES)
    seen: dict[int, Counter] = {}
    for index in range(LANES):
        mix = plan.lane_mix(index)
        dealt, cursors = deal(mix, 3000)
        assert min(cursor.epoch for cursor in cursors) >= 3
        for sample, epoch in zip(dealt.sample_ids.tolist(), dealt.epochs.tolist(), strict=True):
            seen.setdefault(epoch, Counter())[sample] += 1
    assert all(set(seen[epoch].values()) == {1} for epoch in seen)
    assert all(sorted(seen[epoch]) == list(range(480)) for epoch in range(3))


@pytest.mark.parametrize("mix_by", ["images", "tokens"])
def test_a_lane_of_several_sources_goes_on_from_its_state(mix_by):
    plan = Plan(mixed(), config(mix_by=mix_by, pack_window=64), LANES)
    lane, packs, states = plan.lane(1), [], [LaneState()]
    for _ in range(60):
        packs.append(lane.next_pack().sample_ids.tolist())
        text = json.dumps(lane.state.to_json())
        assert len(text) <= 1024
        states.append(LaneState.from_json(json.loads(text)))
    for position, state in enumerate(states[:-1]):
        assert plan.lane(1, state).next_pack().sample_ids.tolist() == packs[position]


def test_the_summary_tells_how_often_each_source_is_seen():
    summary = summarise(Plan(mixed(), config(), LANES))
    assert [source.images for source in summary.sources] == [250, 170, 60]
    images = [source.images * source.epochs for source in summary.sources]
    assert images == pytest.approx([480 * w / sum(WEIGHTS) for w in WEIGHTS], rel=0.03)


def test_epochs_cannot_end_a_run_of_several_sources():
    with pytest.raises(ValueError, match=r"train\.max_epochs .* train\.max_steps"):
        Plan(mixed(), config(), LANES, max_epochs=2)


def test_a_source_with_too_few_images_is_named():
    with pytest.raises(ValueError, match="packs_per_step is 61 but c holds only 60 usable"):
        Plan(mixed(), config(), 61)


def test_weighted_entries_open_as_sources(tmp_path):
    for index, name in enumerate(("a", "b")):
        write_shards(tmp_path / name, [20, 10 + index], seed=index)
        index_shards([str(tmp_path / name)], workers=1, progress=False)
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    manifest = open_shards([{"path": first, "weight": 2}, {"path": [second], "weight": 0.5}])
    assert len(manifest.samples) == 61
    assert [(s.first_shard, s.stop_shard, s.weight) for s in manifest.sources] == [
        (0, 2, 2.0),
        (2, 4, 0.5),
    ]
    assert [shard.first for shard in manifest.shards] == [0, 20, 30, 50]
    swapped = open_shards([{"path": second, "weight": 2}, {"path": first, "weight": 0.5}])
    assert swapped.fingerprint != manifest.fingerprint
    assert open_shards([first, second]).sources == ()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([{"path": "x", "weight": 0}], "weight of x is 0; it must be a number above 0"),
        ([{"path": "x", "weight": "much"}], "weight of x is 'much'"),
        ([{"path": "x", "wieght": 1}], "each needs path and weight, and nothing else"),
        ([{"weight": 1}], "each needs path and weight"),
        ([{"path": "x", "weight": 1}, "y"], "none to 'y'"),
    ],
)
def test_entries_that_make_no_sense_are_refused_by_name(spec, message):
    with pytest.raises(ValueError, match=message):
        open_shards(spec)
