"""The initialisation learns fast on small data."""

import pytest

from tests.benchmarks.small_data import accuracy_after


@pytest.mark.slow
def test_digits_are_learned_in_steps_in_which_tables_of_deviation_0_02_do_not_learn_them():
    ours, usual = (accuracy_after(150, tables, seed=0) for tables in ("zeta", "white 0.02"))
    assert ours > 0.8
    assert ours > usual + 0.3
