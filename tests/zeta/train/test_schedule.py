"""Learning-rate schedules against values worked out by hand."""

import math
from dataclasses import replace

import pytest

from zeta.train.config import OptimConfig, TrainConfig
from zeta.train.schedule import build_schedule


def _rates(steps, max_steps, **options):
    schedule = _build({"max_steps": max_steps, "max_epochs": 1}, **options)
    return [schedule.rate(step, step + 1) for step in steps]


def _build(train, **options):
    return build_schedule(OptimConfig(lr=0.4, **options), TrainConfig(**train))


def test_warmup_is_linear_and_learns_from_the_first_step():
    rates = _rates(range(5), None, warmup_steps=4, schedule="constant")
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


def test_cosine_is_at_the_peak_after_warmup_half_way_at_half_and_ends_at_zero():
    rates = _rates([2, 7, 12, 20], 12, warmup_steps=2, schedule="cosine")
    assert rates == pytest.approx([0.4, 0.2, 0.0, 0.0], abs=1e-12)
    assert _rates([0, 5], 10, schedule="cosine") == pytest.approx([0.4, 0.2])


def test_rsqrt_falls_with_the_root_of_the_step_from_the_end_of_warmup():
    rates = _rates([3, 15, 99], None, warmup_steps=4, schedule="rsqrt")
    assert rates == pytest.approx([0.4, 0.4 * math.sqrt(4 / 16), 0.4 * math.sqrt(4 / 100)])


def test_cooldown_scales_the_last_steps_down_to_zero():
    options = {"cooldown_steps": 4, "schedule": "constant"}
    assert _rates([5, 6, 8, 9, 10], 10, **options) == pytest.approx([0.4, 0.4, 0.2, 0.1, 0.0])
    rsqrt = _rates([8], 10, warmup_steps=1, cooldown_steps=4, schedule="rsqrt")
    assert rsqrt == pytest.approx([0.4 / 3 * 0.5])


def test_warmup_stable_decay_has_three_parts_and_two_shapes_of_the_last():
    options = {"schedule": "wsd", "warmup_steps": 2, "cooldown_steps": 4}
    steps = [0, 1, 2, 7, 8, 9, 10, 11, 12]
    linear = [0.2, 0.4, 0.4, 0.4, 0.4, 0.3, 0.2, 0.1, 0.0]
    assert _rates(steps, 12, **options) == pytest.approx(linear)
    sqrt = [0.4 * (1 - math.sqrt(share)) for share in (0, 0.25, 0.5, 0.75, 1)]
    rates = _rates(steps, 12, cooldown_shape="sqrt", **options)
    assert rates == pytest.approx([0.2, 0.4, 0.4, 0.4, *sqrt])


@pytest.mark.parametrize("unit", ["images", "tokens"])
def test_a_schedule_by_images_or_tokens_does_not_care_how_many_a_step_has(unit):
    ramps = {f"warmup_{unit}": 100, f"cooldown_{unit}": 200}
    wsd = _build({f"max_{unit}": 1000}, schedule="wsd", schedule_by=unit, **ramps)
    assert [wsd.rate(*step) for step in ((0, 25), (25, 60), (60, 130), (130, 131))] == (
        pytest.approx([0.1, 0.24, 0.4, 0.4])  # a step that crosses the end of warm-up: the peak
    )
    assert [wsd.rate(*step) for step in ((750, 850), (850, 990), (1000, 1010))] == (
        pytest.approx([0.4, 0.3, 0.0])
    )
    rsqrt = _build({"max_steps": 3}, schedule="rsqrt", schedule_by=unit, **{f"warmup_{unit}": 100})
    assert rsqrt.rate(300, 400) == pytest.approx(0.2)
    cosine = _build({f"max_{unit}": 1000}, schedule="cosine", schedule_by=unit)
    assert cosine.rate(500, 777) == pytest.approx(0.2)


@pytest.mark.parametrize("unit", ["steps", "images", "tokens"])
def test_a_run_by_epochs_has_the_schedule_of_its_planned_length(unit):
    ramps = {"schedule": "wsd", "warmup_share": 0.1, "cooldown_share": 0.2, "schedule_by": unit}
    optim = OptimConfig(lr=0.4, **ramps)
    by_epochs = build_schedule(optim, TrainConfig(max_epochs=3), 500)
    assert by_epochs == build_schedule(optim, TrainConfig(**{f"max_{unit}": 500}))
    both = TrainConfig(max_epochs=3, **{f"max_{unit}": 100})
    assert build_schedule(optim, both, 500).end == 100
    with pytest.raises(ValueError, match=f"below the 500 {unit} of train.max_epochs = 3: lower"):
        build_schedule(replace(optim, **{f"warmup_{unit}": 450}), TrainConfig(max_epochs=3), 500)


@pytest.mark.parametrize(
    ("train", "optim", "message"),
    [
        ({}, {"schedule": "constant"}, "no end; set train.max_steps, train.max_images"),
        ({"max_epochs": 1}, {"schedule": "cosine"}, "optim.schedule = cosine .* train.max_steps"),
        (
            {"max_epochs": 1},
            {"schedule": "rsqrt", "warmup_steps": 1, "cooldown_steps": 3},
            "optim.cooldown_steps .* set train.max_steps",
        ),
        ({"max_steps": 9}, {"schedule": "rsqrt"}, "rsqrt needs optim.warmup_steps"),
        ({"max_steps": 9}, {"schedule": "wsd"}, "wsd needs optim.cooldown_steps"),
        ({"max_steps": 9}, {"schedule_by": "images"}, "set train.max_images"),
        ({"max_images": 9}, {}, r"set train.max_steps, or optim.schedule_by=images$"),
        (
            {"max_images": 9},
            {"schedule_by": "images", "warmup_steps": 5},
            "optim.warmup_steps is 5, but optim.schedule_by is images: set optim.warmup_images",
        ),
        (
            {"max_tokens": 9},
            {"schedule_by": "tokens", "warmup_tokens": 4, "cooldown_tokens": 5, "schedule": "wsd"},
            "optim.warmup_tokens . optim.cooldown_tokens is 9; .* below train.max_tokens = 9",
        ),
    ],
)
def test_a_schedule_that_cannot_be_says_which_field_to_change(train, optim, message):
    with pytest.raises(ValueError, match=message):
        _build(train, **optim)


@pytest.mark.parametrize(("limit", "unit"), [("images", "steps"), ("steps", "tokens")])
@pytest.mark.parametrize(
    "shape", [{"schedule": "cosine"}, {"schedule": "constant", "warmup_share": 0.1}]
)
def test_a_schedule_does_not_follow_epochs_that_another_limit_may_end_before(limit, unit, shape):
    train = {"max_epochs": 100, f"max_{limit}": 200}
    optim = OptimConfig(schedule_by=unit, **shape)
    with pytest.raises(ValueError, match=f"set train.max_{unit}.*, or optim.schedule_by={limit}, "):
        build_schedule(optim, TrainConfig(**train), 5_000)
    assert build_schedule(replace(optim, schedule_by=limit), TrainConfig(**train)).end == 200
    counted = OptimConfig(schedule="constant", schedule_by=unit, **{f"warmup_{unit}": 5})
    assert build_schedule(counted, TrainConfig(**train), 5_000).end is None


def test_values_out_of_range_are_refused_by_name():
    for name, value in {
        "schedule_by": "epochs",
        "cooldown_shape": "exp",
        "warmup_images": -1,
        "head_weight_decay": -0.1,
    }.items():
        with pytest.raises(ValueError, match=f"optim.{name} is"):
            OptimConfig(**{name: value})
    with pytest.raises(ValueError, match=r"train.max_images is 0"):
        TrainConfig(max_images=0)


@pytest.mark.parametrize("unit", ["steps", "images", "tokens"])
def test_shares_are_of_the_end_in_the_unit_of_the_schedule_and_counts_win(unit):
    options = {"schedule": "wsd", "schedule_by": unit, "warmup_share": 0.1, "cooldown_share": 0.25}
    found = _build({f"max_{unit}": 400}, **options)
    assert (found.warmup, found.cooldown) == (40, 100)
    counted = _build({f"max_{unit}": 400}, **options, **{f"warmup_{unit}": 7})
    assert (counted.warmup, counted.cooldown) == (7, 100)
    none = _build({f"max_{unit}": 400}, **options, **{f"warmup_{unit}": 0})
    assert none.warmup == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_share": 0.6, "cooldown_share": 0.5}, "cooldown_share is 1.1; it must be below 1"),
        ({"warmup_share": 0.5, "cooldown_steps": 50}, "is 100; it must be below train.max_steps"),
    ],
)
def test_ramps_that_leave_nothing_of_the_run_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _build({"max_steps": 100}, schedule="constant", **options)


def test_a_share_is_below_one():
    with pytest.raises(ValueError, match=r"optim.warmup_share is 1; .* below 1"):
        OptimConfig(warmup_share=1.0)
