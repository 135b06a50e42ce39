"""Lists the charts of the report: the metrics that each draws, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from launch.report.logged_run import LoggedRun
from launch.report.svg_charts import NARROW, WIDE, compact, percent
from zeta import metric_names as names


@dataclass(frozen=True)
class Chart:
    """A chart of metrics along the x-axis."""

    name: str
    title: str
    curves: tuple[tuple[str, str], ...]
    """Label and metric name of each curve."""
    y_label: str
    """Quantity and unit of the y-axis."""
    format_value: Callable[[float], str] = compact
    size: tuple[float, float] = NARROW
    smooth: bool = False
    include: tuple[float, ...] = ()
    """Values that the y-axis always includes."""
    log: bool = False
    absent: str = ""
    """Why a run may never log the metric, as HTML."""


LOSS = Chart(
    "loss",
    "Training loss",
    (("loss", names.TRAIN_LOSS),),
    "mean loss of an image",
    size=WIDE,
    smooth=True,
)
CHARTS = (
    Chart(
        "images",
        "Images per second",
        (("images/s", names.IMAGES_PER_S),),
        "images / s",
        include=(0.0,),
    ),
    Chart(
        "tokens",
        "Tokens per second",
        (("tokens/s", names.TOKENS_PER_S),),
        "tokens / s",
        include=(0.0,),
    ),
    Chart(
        "mfu",
        "Model FLOPs utilisation",
        (("MFU", names.MFU),),
        "share of the peak",
        percent,
        include=(0.0,),
        absent="the peak of the devices is unknown; set <code>train.peak_tflops</code>",
    ),
    Chart(
        "time",
        "Seconds per step",
        (("whole step", names.STEP_S), ("waiting for data", names.DATA_WAIT_S)),
        "seconds / step",
        include=(0.0,),
    ),
    Chart(
        "fill",
        "Fill of the packs",
        (("fill", names.FILL),),
        "share of the budget",
        percent,
        include=(0.9, 1.0),
    ),
    Chart(
        "balance",
        "Straggler ratio: slowest rank / mean",
        (("ratio", names.STRAGGLER_RATIO),),
        "slowest / mean",
        include=(1.0,),
    ),
    Chart(
        "memory", "Peak memory of a rank, GiB", (("GiB", names.PEAK_GIB),), "GiB", include=(0.0,)
    ),
    Chart("lr", "Learning rate", (("lr", names.LEARNING_RATE),), "learning rate", include=(0.0,)),
    Chart(
        "norm",
        "Gradient norm",
        (("gradient norm", names.GRAD_NORM),),
        "L2 norm",
        smooth=True,
        log=True,
    ),
)
_IN_WORDS = {"top1": "top-1"}
_TRAINED = "sizes of training"
_SPREAD = (
    (names.EMBEDDING_RANK, "Effective rank of the embeddings", "directions"),
    (names.EMBEDDING_DEVIATION, "Deviation of the embeddings", "mean over channels"),
)


def validation_charts(*runs: LoggedRun) -> tuple[Chart, ...]:
    """Return the charts of held-out images: loss, headline score, probes, spread of embeddings.

    Curves are in this order: the score at the sizes of training, at each token budget, and of the
    average of the weights. The headline score is that of the first run that has one. The scores of
    the probes of the encoder share a chart.
    """
    charts = []
    if curves := _curves(runs, "loss"):
        charts.append(
            Chart("val-loss", "Validation loss", curves, "mean loss of an image", size=WIDE)
        )
    headline = next(filter(None, map(headline_score, runs)), None)
    if headline and (curves := _curves(runs, headline)):
        score = _IN_WORDS.get(headline, headline.replace("_", " "))
        charts.append(Chart("val-score", f"Validation {score}", curves, score, percent, size=WIDE))
    named = (("k-NN", "knn_top1"), ("linear probe", "probe_top1"))
    if curves := tuple(
        (f"{words}, {size}" if size != _TRAINED else words, metric)
        for words, name in named
        for size, metric in _curves(runs, name)
    ):
        title = "Validation top-1 by embeddings"
        charts.append(Chart("val-probes", title, curves, "top-1", percent))
    for name, title, quantity in _SPREAD:
        if curves := _curves(runs, name):
            chart = Chart(f"val-{name.replace('_', '-')}", title, curves, quantity, include=(0.0,))
            charts.append(chart)
    return tuple(charts)


def headline_score(run: LoggedRun) -> str | None:
    """Return the score whose best value the run logged, such as top1; None: not evaluated yet."""
    prefix = names.val_best("")
    noted = (name.removeprefix(prefix) for name in run.series if name.startswith(prefix))
    return next((score for score in noted if names.val_best(score) != names.VAL_BEST_STEP), None)


def score_by_tokens(run: LoggedRun, score: str) -> list[tuple[str, float]]:
    """Return (token budget, last value) of a score at each token budget."""
    return [
        (f"{place:g}", value)
        for place, _, metric in sorted(_sizes(run, score))
        if 0 < place < math.inf and (value := run.series[metric].last) is not None
    ]


def _curves(runs: Sequence[LoggedRun], score: str) -> tuple[tuple[str, str], ...]:
    found = {size for run in runs for size in _sizes(run, score)}
    return tuple((label, metric) for _, label, metric in sorted(found))


def _sizes(run: LoggedRun, score: str) -> Iterator[tuple[float, str, str]]:
    """Yield (sort key, label, metric) of a score at every size that was logged."""
    pattern = re.compile(re.escape(names.val_score(score)) + r"(?:_at_(\d+)_tokens)?(_of_average)?")
    for metric, series in run.series.items():
        match = pattern.fullmatch(metric)
        if match is None or series.last is None:
            continue
        tokens, average = match.groups()
        if average:
            yield math.inf, "average of the weights", metric
        elif tokens:
            yield float(tokens), f"{tokens} tokens", metric
        else:
            yield 0.0, _TRAINED, metric
