"""Every sample of an epoch is dealt to exactly one lane, in an order of its own."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.plan.lanes import Cursor, LaneDeal, LaneStream


def make_deal(counts: list[int], lanes: int, group_shards: int = 1, seed: int = 0) -> LaneDeal:
    values = np.array(counts)
    firsts = np.cumsum([0, *counts])[:-1]
    return LaneDeal(firsts, values, values * 10.0, lanes, group_shards, seed)


def read_epoch(deal: LaneDeal, lane: int, chunk: int, epoch: int = 0) -> list[int]:
    stream, cursor, ids = LaneStream(deal, lane), Cursor(epoch), []
    while cursor.epoch == epoch:
        taken, cursor = stream.take(cursor, chunk)
        ids += taken.tolist()
    return ids


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    lanes=st.integers(1, 12),
    group_shards=st.integers(1, 4),
    chunk=st.integers(1, 50),
    epoch=st.integers(0, 3),
)
def test_the_lanes_of_an_epoch_hold_every_sample_once(counts, lanes, group_shards, chunk, epoch):
    if sum(counts) < lanes:
        return
    deal = make_deal(counts, lanes, group_shards)
    dealt = [i for lane in range(lanes) for i in read_epoch(deal, lane, chunk, epoch)]
    assert sorted(dealt) == list(range(sum(counts)))


def test_the_order_does_not_depend_on_how_much_is_taken_at_a_time():
    deal = make_deal([40, 70, 30], lanes=3)
    assert read_epoch(deal, 1, 7) == read_epoch(deal, 1, 1000)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [
        read_epoch(make_deal([50] * 4, 2, seed=seed), 0, 100, epoch)
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_lanes_get_equal_token_mass():
    rng = np.random.default_rng(0)
    counts = rng.integers(500, 1500, 40)
    masses = counts * rng.uniform(50, 500, 40)
    deal = LaneDeal(np.cumsum([0, *counts])[:-1], counts, masses, 16, 1, 0)
    per_sample = np.repeat(masses / counts, counts)
    lane_masses = [per_sample[read_epoch(deal, lane, 10_000)].sum() for lane in range(16)]
    assert max(lane_masses) / np.mean(lane_masses) < 1.01


def test_fewer_shards_than_lanes_give_every_lane_samples():
    assert all(read_epoch(make_deal([30], 7), lane, 100) for lane in range(7))
