"""Curves of a report: the same for the same run, whatever its `train.log_every` was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from launch.report.compared_runs import ComparedRuns
from launch.report.headlines import headlines
from launch.report.logged_run import read_run
from launch.report.stretches import MAX_STRETCHES, drawn_series
from zeta import metric_names as names

STEPS = 240


def write_logged(path: Path, every: int, steps: int = STEPS) -> Path:
    """Write the lines that one and the same run logs with `train.log_every` of `every`."""
    rng = np.random.default_rng(0)
    images = rng.integers(10, 90, steps).astype(np.float64)
    seconds = 0.1 + rng.random(steps)
    loss = 2.0 * np.exp(-np.arange(steps) / 60) + 0.3 * rng.random(steps)
    norms = 1.0 + 0.2 * rng.random(steps)
    path.mkdir()
    lines = []
    for end in [*range(every, steps, every), steps]:
        part = slice((end - 1) // every * every, end)
        took = seconds[part].sum()
        lines.append({
            "step": end,
            names.TRAIN_LOSS: float((loss * images)[part].sum() / images[part].sum()),
            names.IMAGES_PER_S: float(images[part].sum() / took),
            names.TOKENS_PER_S: float(20 * images[part].sum() / took),
            names.STEP_S: float(took / len(images[part])),
            names.FILL: float(images[part].mean() / 100),
            names.GRAD_NORM: float(norms[end - 1]),
            names.LEARNING_RATE: 1e-3 * min(1.0, end / 40),
            names.IMAGES_SEEN: float(images[:end].sum()),
            names.TOKENS_SEEN: float(20 * images[:end].sum()),
        })  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def both(tmp_path):
    return [read_run(write_logged(tmp_path / str(every), every)) for every in (1, 20)]


@pytest.mark.parametrize(
    "metric",
    [names.TRAIN_LOSS, names.IMAGES_PER_S, names.TOKENS_PER_S, names.STEP_S, names.FILL,
     names.LEARNING_RATE],
)  # fmt: skip
def test_a_run_logged_every_step_and_every_20_gives_one_and_the_same_curve(both, metric):
    runs = ComparedRuns(both)
    one, twenty = (runs.curve(run, metric) for run in runs.runs)
    assert one.steps.tolist() == twenty.steps.tolist() == list(range(20, STEPS + 1, 20))
    assert one.values.tolist() == pytest.approx(twenty.values.tolist(), rel=1e-9)
    assert np.ptp(one.values) > 0


def test_a_sampled_gradient_norm_keeps_its_level_and_is_averaged_where_it_was_logged_more(both):
    runs = ComparedRuns(both)
    one, twenty = (runs.curve(run, names.GRAD_NORM) for run in runs.runs)
    assert one.steps.tolist() == twenty.steps.tolist()
    assert np.abs(one.values - twenty.values).max() <= 0.1 + 0.06  # half the range of the noise
    assert one.values.std() < twenty.values.std() / 2


@pytest.mark.parametrize("axis", ["images", "tokens", "time"])
def test_the_curves_coincide_along_the_other_axes_within_a_stretch(both, axis):
    runs = ComparedRuns(both, axis)
    one, twenty = (runs.curve(run, names.TRAIN_LOSS) for run in runs.runs)
    assert one.steps.tolist() == pytest.approx(twenty.steps.tolist())
    assert np.abs(one.values - twenty.values).max() < 0.15
    assert np.abs(one.values - twenty.values).mean() < 0.05


def test_the_headline_numbers_do_not_depend_on_how_often_was_logged(both):
    steps = ComparedRuns(both).steps_averaged
    one, twenty = ([value for _, value, _ in headlines(run, steps)] for run in both)
    assert one == twenty


def test_a_single_run_is_drawn_as_it_was_logged(both):
    run = both[1]
    curve = ComparedRuns([run]).curve(run, names.TRAIN_LOSS)
    assert curve.steps.tolist() == run.series[names.TRAIN_LOSS].steps.tolist()
    assert curve.values.tolist() == pytest.approx(run.series[names.TRAIN_LOSS].values.tolist())


def test_a_shorter_last_line_ends_the_curve_where_the_run_ended(tmp_path):
    run = read_run(write_logged(tmp_path / "run", 20, steps=65))
    curve = ComparedRuns([run]).curve(run, names.FILL)
    assert curve.steps.tolist() == [20, 40, 60, 65]
    assert curve.values[-1] == pytest.approx(run.series[names.FILL].last)


def test_a_long_run_is_drawn_with_few_points(tmp_path):
    run = read_run(write_logged(tmp_path / "run", 1, steps=3001))
    runs = ComparedRuns([run])
    for metric in (names.TRAIN_LOSS, names.LEARNING_RATE):
        curve = runs.curve(run, metric)
        assert 200 < len(curve.steps) <= MAX_STRETCHES
        assert curve.steps[-1] == 3001


def test_values_that_are_not_finite_leave_one_mark_and_change_no_average(both):
    run = both[0]
    values = run.series[names.TRAIN_LOSS].values
    values[25], values[27] = np.nan, np.inf
    values[40:60] = np.nan
    values[70] = 1e300
    curve = ComparedRuns(both).curve(run, names.TRAIN_LOSS)
    assert curve.steps[~np.isfinite(curve.values)].tolist() == [40, 60]
    assert 60 not in curve.finite.steps
    at = dict(zip(curve.finite.steps.tolist(), curve.finite.values.tolist(), strict=True))
    kept = np.isfinite(values[20:40])
    weights = np.diff(run.series[names.IMAGES_SEEN].values, prepend=0.0)[20:40][kept]
    assert at[40] == pytest.approx(np.average(values[20:40][kept], weights=weights))
    assert at[100] < 3  # a huge value before costs no digits


@pytest.mark.parametrize("step", [0, 1, 7])
def test_one_line_is_one_point(tmp_path, step):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": step, names.TRAIN_LOSS: 2.5}))
    run = read_run(tmp_path)
    curve = drawn_series(run, names.TRAIN_LOSS, lambda at: at, 10.0)
    assert (curve.steps.tolist(), curve.values.tolist()) == ([step], [2.5])


def test_a_step_far_beyond_the_others_is_drawn_in_as_few_stretches(tmp_path):
    path = write_logged(tmp_path / "run", 20)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    far = {**json.loads(lines[-1]), "step": 10**13}
    (path / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(far)]) + "\n")
    run = read_run(path)
    runs = ComparedRuns([run])
    for metric in (names.TRAIN_LOSS, names.LEARNING_RATE):
        assert len(runs.curve(run, metric).steps) <= MAX_STRETCHES
    assert {label: value for label, value, _ in headlines(run)}["Steps"] == f"{10**13:,}"
