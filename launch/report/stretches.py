"""Averages metrics over equal stretches of the x-axis, so that every run is drawn alike.

A line of metrics.jsonl holds means over the steps since the line before, and samples of its last
step. Lines of different length (`train.log_every`) must not give different curves: means are summed
again with the weights by which they were averaged, and levels are read off at the same places.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from launch.report.logged_run import Floats, LoggedRun, Series
from zeta import metric_names as names

MAX_STRETCHES = 300
"""Most points of a curve."""

_BY_STEPS, _BY_IMAGES, _BY_SECONDS = "steps", "images", "seconds"
_WEIGHTS = {
    names.TRAIN_LOSS: _BY_IMAGES,
    names.IMAGES_PER_S: _BY_SECONDS,
    names.TOKENS_PER_S: _BY_SECONDS,
    names.MFU: _BY_SECONDS,
    names.STEP_S: _BY_STEPS,
    names.DATA_WAIT_S: _BY_STEPS,
    names.FILL: _BY_STEPS,
    names.STRAGGLER_RATIO: _BY_STEPS,
    # A sample of the last step, but a noisy one: it stands for the steps since the line before.
    names.GRAD_NORM: _BY_STEPS,
}
"""What each mean of a line was averaged over."""
_LEVELS = (names.LEARNING_RATE, names.PEAK_GIB)
"""Metrics of every line that change slowly and are samples of its last step."""


def stretch_width(places: Floats) -> float:
    """Return the width of the lines of a run: the median distance of their places on the axis."""
    widths = np.diff(places, prepend=0.0)
    widths = widths[widths > 0]
    return float(np.median(widths)) if len(widths) else 1.0


def fit_width(width: float, end: float) -> float:
    """Return the smallest multiple of `width` of which MAX_STRETCHES reach `end`."""
    return width * max(1, int(np.ceil(end / (width * MAX_STRETCHES) - 1e-9)))


def drawn_series(
    run: LoggedRun, metric: str, place: Callable[[Floats], Floats], width: float
) -> Series:
    """Return the points of a curve, whose `steps` are places on the axis.

    Means are averaged over stretches, and drawn at the end of each; levels are read off there.
    Other metrics, such as those of evaluations, are drawn as they are while they are few. A value
    that is not finite counts nowhere, and leaves one NaN at the end of its stretch.

    Args:
        run: the run, which logged the metric.
        metric: name in `zeta.metric_names`.
        place: returns the places of steps on the axis.
        width: of a stretch, on the axis.
    """
    series = run.series[metric]
    good = series.finite
    at = place(series.steps)
    if metric in _WEIGHTS:
        drawn = _means(run, metric, place, width)
    elif len(good.steps) > 1 and (metric in _LEVELS or len(good.steps) > MAX_STRETCHES):
        drawn = _levels(Series(place(good.steps), good.values), width)
    else:
        drawn = Series(place(good.steps), good.values)
    bad = at[~np.isfinite(series.values)]
    lost = np.unique(np.minimum(np.ceil(bad / width - 1e-9) * width, at[-1]))
    steps = np.concatenate([drawn.steps, lost])
    values = np.concatenate([drawn.values, np.full(len(lost), np.nan)])
    order = np.argsort(steps, kind="stable")
    return Series(steps[order], values[order])


def last_lines(run: LoggedRun) -> Floats:
    """Return the last step of each line with the means of steps."""
    lines = run.series.get(names.STEP_S) or run.series.get(names.TRAIN_LOSS)
    return lines.steps if lines else np.array([float(run.steps)])


def _means(run: LoggedRun, metric: str, place: Callable[[Floats], Floats], width: float) -> Series:
    """Average a metric over stretches, each line of it with its own weight."""
    series = run.series[metric]
    lines = np.concatenate([[0.0], np.union1d(last_lines(run), series.steps)])
    values = np.full(len(lines) - 1, np.nan)
    values[np.searchsorted(lines, series.steps) - 1] = series.values
    weights = _line_weights(run, _WEIGHTS[metric], lines)
    weights[~np.isfinite(values)] = 0.0
    at = place(lines)
    edges = _edges(float(at[-1]), width)
    # Pieces lie in one line and one stretch: no difference of long sums, which would lose digits.
    cuts = np.union1d(at, edges)
    middle, lengths = (cuts[1:] + cuts[:-1]) / 2, np.diff(cuts)
    line = np.clip(np.searchsorted(at, middle) - 1, 0, len(values) - 1)
    stretch = np.clip(np.searchsorted(edges, middle) - 1, 0, len(edges) - 2)
    share = weights[line] * lengths / np.maximum(np.diff(at)[line], 1e-300)
    total = np.bincount(stretch, share, len(edges) - 1)
    summed = np.bincount(stretch, share * np.nan_to_num(values)[line], len(edges) - 1)
    shown = total > 1e-6 * total.max()
    if not shown.any():  # only lines of no length: a step 0
        return Series(at[1:][np.isfinite(values)], values[np.isfinite(values)])
    return Series(edges[1:][shown], summed[shown] / total[shown])


def _line_weights(run: LoggedRun, kind: str, lines: Floats) -> Floats:
    """Return the weight of each line between the steps `lines`; steps if others are not known."""
    steps = np.diff(lines)
    if kind == _BY_SECONDS and (times := run.series.get(names.STEP_S)) and len(times.finite.steps):
        return steps * np.interp(lines[1:], times.finite.steps, times.finite.values)
    seen = run.series.get(names.IMAGES_SEEN)
    if kind == _BY_IMAGES and seen and len(seen.finite.steps):
        images = np.interp(lines, np.append(0.0, seen.finite.steps),
                           np.append(0.0, seen.finite.values))  # fmt: skip
        weights: Floats = np.diff(images)
        if (weights > 0).all():
            return weights
    return steps


def _levels(series: Series, width: float) -> Series:
    """Read values off at the ends of stretches, between the first and the last place."""
    edges = _edges(float(series.steps[-1]), width)
    edges = edges[edges >= series.steps[0]]
    return Series(edges, np.interp(edges, series.steps, series.values))


def _edges(end: float, width: float) -> Floats:
    """Return 0 and the ends of all stretches; the last one is cut at `end`."""
    count = max(1, int(np.ceil(end / width - 1e-9)))
    edges = np.arange(count + 1, dtype=np.float64) * np.float64(width)
    edges[-1] = end
    return edges
