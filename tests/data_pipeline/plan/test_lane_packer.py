"""Lanes give packs of like cost at the same step, wherever their windows begin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import DropConfig, ResolutionConfig
from data_pipeline.plan.lane_packer import step_order
from data_pipeline.plan.plan import Plan
from tests.data_pipeline.synthetic import config, synthetic_manifest


@given(count=st.integers(1, 200), first=st.integers(0, 10**9))
def test_every_pack_of_a_window_has_one_step(count, first):
    costs = list(np.random.default_rng(count).uniform(1, 2, count))
    assert sorted(step_order(costs, first)) == list(range(count))


def test_windows_that_begin_at_other_steps_give_the_same_quantile_at_a_step():
    rng = np.random.default_rng(0)
    at_step: dict[int, list[float]] = {}
    for first in (1000, 1013, 1040, 1077):
        quantiles = rng.permutation(np.arange(100) / 100)
        for offset, pack in enumerate(step_order(quantiles.tolist(), first)):
            at_step.setdefault(first + offset, []).append(float(quantiles[pack]))
    shared = [values for values in at_step.values() if len(values) == 4]
    assert len(shared) > 15
    assert max(np.ptp(values) for values in shared) < 0.06


def test_neighbouring_steps_are_of_all_costs():
    costs = np.arange(96.0)
    order = np.array(step_order(costs.tolist(), 12_345))
    for start in range(0, 96, 8):
        assert costs[order[start : start + 8]].mean() == pytest.approx(47.5, abs=8)


def test_no_image_is_left_over_twice_even_where_none_fits_beside_another():
    # Every image takes 0.51 to 0.9 of the budget, so half of each window is left over.
    manifest = synthetic_manifest([3000])
    rng = np.random.default_rng(1)
    manifest.samples["height"] = 8
    manifest.samples["width"] = 8 * rng.integers(131, 230, 3000)
    data = config(
        resolution=ResolutionConfig("native", max=10_000), drop=DropConfig("none"), pack_window=200
    )
    lane = Plan(manifest, data, num_lanes=1, max_epochs=1).lane(0)
    order, dealt = [], Plan(manifest, data, num_lanes=1, max_epochs=1).lane_mix(0)
    for pack in lane:
        order += pack.sample_ids.tolist()
    samples, _ = dealt.deal(dealt.first_cursors(), 4096)
    place = {int(sample): index for index, sample in enumerate(samples.sample_ids)}
    windows = [place[sample] // 200 for sample in order]
    assert sorted(order) == list(range(3000))
    # Dealt in window k, an image is placed in window k or k + 1.
    last_of = {k: max(i for i, w in enumerate(windows) if w == k) for k in set(windows)}
    first_of = {k: min(i for i, w in enumerate(windows) if w == k) for k in set(windows)}
    assert all(last_of[k] < first_of[k + 2] for k in range(max(windows) - 1))


@pytest.mark.parametrize("max_epochs", [None, 5])
@pytest.mark.parametrize("images", [7, 60, 900])
def test_packs_do_not_depend_on_how_many_epochs_are_sized_at_once(monkeypatch, images, max_epochs):
    manifest = synthetic_manifest([images, images // 2])

    def packs_and_states():
        plan = Plan(manifest, config(views=2), num_lanes=3, max_epochs=max_epochs)
        lane, taken = plan.lane(1), []
        while len(taken) < 20 and (pack := lane.next_pack()) is not None:
            taken.append((pack.sample_ids.tolist(), pack.epochs.tolist(), lane.state))
        return taken

    together = packs_and_states()
    monkeypatch.setattr("data_pipeline.plan.lane_packer._MOST_DEALS", 1)
    assert packs_and_states() == together
    assert together
