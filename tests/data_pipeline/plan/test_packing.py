"""Packs are within their limits, full, balanced, and lose nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.plan.packing import PackLimits, image_costs, pack_window

LENGTHS = st.lists(st.integers(1, 64), max_size=200)


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, max_images=st.integers(1, 20), flush=st.booleans(), first=st.integers(0, 9))
def test_every_image_is_packed_once_or_left_over(lengths, max_images, flush, first):
    values = np.array(lengths, dtype=np.int64)
    packs, leftovers = pack_window(
        values, image_costs(values, 64), PackLimits(64, max_images), num_first=first, flush=flush
    )
    assert sorted([i for pack in packs for i in pack] + leftovers.tolist()) == list(
        range(len(lengths))
    )
    assert all(0 < len(pack) <= max_images and values[pack].sum() <= 64 for pack in packs)
    assert len(leftovers) == 0 if flush else (leftovers >= first).all()


def test_an_image_limit_below_the_token_budget_does_not_pile_up_leftovers():
    lengths = np.full(1000, 4)
    packs, leftovers = pack_window(lengths, image_costs(lengths, 64), PackLimits(1024, 10))
    assert len(packs) == 100
    assert len(leftovers) == 0


@pytest.mark.parametrize(
    ("budget", "low", "high", "floor"), [(4096, 16, 1024, 0.995), (1024, 8, 128, 0.985)]
)
def test_packs_are_full_and_cost_about_the_same(budget, low, high, floor):
    rng = np.random.default_rng(0)
    lengths = (rng.uniform(low**0.5, high**0.5, 2048) ** 2).astype(np.int64)
    costs = image_costs(lengths, 768)
    packs, _ = pack_window(lengths, costs, PackLimits(budget, 1000))
    fill = sum(lengths[pack].sum() for pack in packs) / (len(packs) * budget)
    pack_costs = np.array([costs[pack].sum() for pack in packs])
    assert fill >= floor
    assert pack_costs.max() / pack_costs.mean() < 1.02


def test_what_was_left_over_is_placed_first():
    lengths = np.array([3, *([61] * 30), *([64] * 30)])
    _, leftovers = pack_window(lengths, image_costs(lengths, 64), PackLimits(64, 8), num_first=1)
    assert 0 not in leftovers


def test_cost_counts_attention_as_length_squared_over_six_widths():
    assert image_costs(np.array([600]), 100)[0] == 600 * (1 + 600 / 600)


def test_short_leftovers_do_not_pile_up_in_one_pack():
    rng = np.random.default_rng(2)
    short = rng.integers(9, 37, 600)
    fresh = np.concatenate([rng.integers(16, 80, 550), rng.integers(400, 1100, 230)])
    lengths = np.concatenate([short, fresh])
    costs = image_costs(lengths, 1024)
    packs, _ = pack_window(lengths, costs, PackLimits(16384, 256), num_first=600)
    assert min(lengths[pack].sum() for pack in packs) > 0.995 * 16384


def test_few_and_coarse_lengths_fill_packs_by_exchanges():
    rng = np.random.default_rng(3)
    usual = rng.choice([1200, 1080, 713, 1444], 2048, p=[0.45, 0.33, 0.15, 0.07])
    lengths = np.where(rng.random(2048) < 0.15, 40 * rng.integers(12, 41, 2048), usual)
    costs = image_costs(lengths, 1024)
    packs, _ = pack_window(lengths, costs, PackLimits(16384, 256))
    assert np.mean([lengths[pack].sum() for pack in packs]) > 0.993 * 16384
