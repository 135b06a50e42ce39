"""Computes the headline numbers of a report: how good, how fast, how long."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from launch.report.logged_run import Floats, LoggedRun, Series, finite_number
from launch.report.stretches import drawn_series, fit_width, last_lines, stretch_width
from launch.report.svg_charts import compact, percent
from zeta import metric_names as names


def headlines(run: LoggedRun, steps: float | None = None) -> Iterator[tuple[str, str, str]]:
    """Yield (label, value, hint) of each number; an unknown value is a dash.

    Args:
        run: the run.
        steps: rates are medians over stretches of so many steps, or of a multiple in a long run; by
            default those of its lines.
    """
    steps = stretch_width(last_lines(run)) if steps is None else steps
    top1 = _first(run.result.get("val_top1"), run.evaluation.get("top1"))
    top5 = finite_number(run.evaluation.get("top5"))
    size = run.evaluation.get("size")
    parts = [f"top-5 {percent(top5)}" if top5 else "", size if isinstance(size, str) else ""]
    hint = "; ".join(part for part in parts if part)
    if top1 is None and (top1 := last_value(run, names.val_score("top1"))) is not None:
        hint = "during training, each image at up to the largest size there"
    yield "Validation top-1", _show(top1, percent), hint

    measured = finite_number(run.result.get("train_seconds"))
    seconds = measured if measured is not None else seconds_in_steps(run)
    hint = "training" if measured is not None or seconds is None else "sum of the step times"
    yield "Wall time", _show(seconds, _duration), hint

    rate = _first(run.result.get("images_per_s"), _median(run, names.IMAGES_PER_S, steps))
    tokens = _median(run, names.TOKENS_PER_S, steps)
    yield "Images per second", _show(rate, _count), f"{compact(tokens)} tokens/s" if tokens else ""

    budget = finite_number(run.setting("data.token_budget"))
    fill = _first(run.result.get("fill"), _mean(run, names.FILL))
    yield "Fill of the packs", _show(fill, percent), f"of {budget:,.0f} tokens" if budget else ""

    packs = finite_number(run.setting("train.packs_per_step"))
    yield "Steps", f"{run.steps:,}", f"{packs:,.0f} packs each" if packs else ""

    seen, tokens_seen = last_value(run, names.IMAGES_SEEN), last_value(run, names.TOKENS_SEEN)
    hint = f"{compact(tokens_seen)} tokens" if tokens_seen else ""
    yield "Images seen", _show(seen, _count), hint


def last_value(run: LoggedRun, metric: str) -> float | None:
    """Return the last finite value of a metric; None: not logged."""
    return run.series[metric].last if metric in run.series else None


def seconds_in_steps(run: LoggedRun) -> float | None:
    """Return the seconds spent in steps: each logged step time counts for the steps before it."""
    series = run.series.get(names.STEP_S, Series(np.zeros(0), np.zeros(0))).finite
    if not len(series.steps):
        return None
    return float((np.diff(series.steps, prepend=0.0) * series.values).sum())


def _first(*values: object) -> float | None:
    """Return the first value that is a finite number."""
    numbers = (finite_number(value) for value in values)
    return next((number for number in numbers if number is not None), None)


def _median(run: LoggedRun, metric: str, steps: float) -> float | None:
    values = _averaged(run, metric, fit_width(steps, float(run.steps)))
    return float(np.median(values)) if len(values) else None


def _mean(run: LoggedRun, metric: str) -> float | None:
    values = _averaged(run, metric, float(run.steps))
    return float(values[0]) if len(values) else None


def _averaged(run: LoggedRun, metric: str, steps: float) -> Floats:
    """Return the finite means of a metric over stretches of so many steps."""
    if metric not in run.series or run.series[metric].last is None:
        return np.zeros(0)
    return drawn_series(run, metric, lambda at: at, steps).finite.values


def _count(value: float) -> str:
    return f"{value:,.0f}" if abs(value) < 1e6 else compact(value)


def _duration(seconds: float) -> str:
    """Write seconds in the two largest units that fit: 42 s, 2 min 31 s, 3 h 5 min, 21 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    place = next(i for i, (_, length) in enumerate(units) if whole >= length)
    (big, length), (small, part) = units[place], units[place + 1]
    return f"{whole // length} {big} {whole % length // part} {small}"


def _show(value: float | None, write: Callable[[float], str]) -> str:
    return "\u2013" if value is None else write(value)
