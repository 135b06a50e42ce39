"""The index cipher is a permutation, keyed, and mixes."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.plan.shuffle import permute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4096, 70_001])
def test_every_index_appears_once(size: int):
    assert sorted(permute(np.arange(size), size, key=9)) == list(range(size))


def test_a_part_of_the_permutation_needs_no_other_part():
    whole = permute(np.arange(5000), 5000, key=3)
    assert (permute(np.arange(1200, 1300), 5000, key=3) == whole[1200:1300]).all()


@pytest.mark.parametrize("size", [2, 6, 17, 400, 1024, 1025])
def test_a_permutation_looked_up_in_a_table_is_the_one_computed_index_by_index(monkeypatch, size):
    looked_up = permute(np.arange(size), size, key=5)
    monkeypatch.setattr("data_pipeline.plan.shuffle._WHOLE", 0)
    assert (permute(np.arange(size), size, key=5) == looked_up).all()


def test_the_key_changes_the_order_and_the_order_is_mixed():
    first, second = (permute(np.arange(10_000), 10_000, key=key) for key in (1, 2))
    assert (first == second).mean() < 0.01
    assert abs(np.corrcoef(first, np.arange(10_000))[0, 1]) < 0.04
