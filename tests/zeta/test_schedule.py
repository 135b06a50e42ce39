"""Learning-rate schedules against values worked out by hand."""

import math

import pytest

from zeta.schedule import learning_rate
from zeta.train_config import OptimConfig


def _rates(steps, max_steps, **options):
    config = OptimConfig(lr=0.4, **options)
    return [learning_rate(step, config, max_steps) for step in steps]


def test_warmup_is_linear_and_learns_from_the_first_step():
    rates = _rates(range(5), None, warmup_steps=4, schedule="constant")
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


def test_cosine_is_at_the_peak_after_warmup_half_way_at_half_and_ends_at_zero():
    rates = _rates([2, 7, 12, 20], 12, warmup_steps=2, schedule="cosine")
    assert rates == pytest.approx([0.4, 0.2, 0.0, 0.0], abs=1e-12)


def test_rsqrt_falls_with_the_root_of_the_step_from_the_end_of_warmup():
    rates = _rates([3, 15, 99], None, warmup_steps=4, schedule="rsqrt")
    assert rates == pytest.approx([0.4, 0.4 * math.sqrt(4 / 16), 0.4 * math.sqrt(4 / 100)])


def test_cooldown_scales_the_last_steps_down_to_zero():
    options = {"cooldown_steps": 4, "schedule": "constant"}
    assert _rates([5, 6, 8, 9, 10], 10, **options) == pytest.approx([0.4, 0.4, 0.2, 0.1, 0.0])
    rsqrt = _rates([8], 10, warmup_steps=1, cooldown_steps=4, schedule="rsqrt")
    assert rsqrt == pytest.approx([0.4 / 3 * 0.5])


def test_a_schedule_that_needs_an_end_says_which_field_is_missing():
    with pytest.raises(ValueError, match=r"optim.schedule = cosine .* set train.max_steps"):
        learning_rate(0, OptimConfig(schedule="cosine"), None)
    with pytest.raises(ValueError, match=r"optim.cooldown_steps .* set train.max_steps"):
        learning_rate(0, OptimConfig(schedule="rsqrt", cooldown_steps=3), None)
