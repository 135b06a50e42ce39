"""The benchmark of a rank's CPU time runs, and its parts are all of it."""

from __future__ import annotations

import pytest

from tests.benchmarks.loading.rank_cpu import local_plan, measure


def test_the_parts_of_a_ranks_cpu_time_add_up():
    (found,) = measure(local_plan(lanes=2, workers=1), steps=2, rounds=1)
    parts = {name: spent for name, spent in found.items() if name != "all"}
    assert set(parts) == {"plan", "receive", "threads", "join"}
    assert sum(parts.values()) == pytest.approx(found["all"])
    assert min(found["plan"], found["join"]) > 0
