"""The length of a run by its plan: steps, epochs and images, and the time at a known rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from data_pipeline.plan.length import planned_length
from data_pipeline.plan.over_run import RunMeans, drop_rate_moves, means_over_run
from data_pipeline.plan.plan import Plan
from data_pipeline.plan.summary import PlanSummary
from zeta.train.config import TrainConfig

_DAY_S = 86_400
_ROUNDS = 4
"""Rounds in which the number of images of a run is found; each takes about a second."""


@dataclass(frozen=True)
class RunLength:
    """The length of a run by its plan."""

    summary: PlanSummary
    """Summary of the first epoch."""
    tokens_per_step: float
    """Mean over the run."""
    images_per_step: float
    """Mean over the run, every view counted."""
    steps: int | None
    """Steps of the whole run; None: it has no end."""
    images_seen: int = 0
    """Images of the steps that the newest checkpoint has done."""

    @property
    def images(self) -> float | None:
        """Images of the whole run, every view counted; None: it has no end."""
        return None if self.steps is None else self.steps * self.images_per_step

    @property
    def images_left(self) -> float | None:
        """Images to the end; None: it has no end."""
        return None if self.images is None else max(0.0, self.images - self.images_seen)

    @property
    def epochs(self) -> float | None:
        """Passes over the images, of all sources together; None: it has no end."""
        of_epoch = max(self.summary.images * self.summary.views, 1)
        return None if self.images is None else self.images / of_epoch


def length_by_plan(
    train: TrainConfig, plan: Plan, summary: PlanSummary, images_seen: int = 0
) -> RunLength:
    """Return the length of a run by the nearest of its limits.

    Args:
        train: the limits.
        plan: the plan of the run.
        summary: its summary.
        images_seen: images of the steps that are done.
    """
    means = _means(train, plan, summary)
    images = train.packs_per_step * means.images_per_pack
    tokens = images * means.tokens_per_image
    planned = (
        train.max_steps,
        None if train.max_epochs is None else planned_length(plan, "steps"),
        None if train.max_images is None else ceil(train.max_images / images),
        None if train.max_tokens is None else ceil(train.max_tokens / tokens),
    )
    ends = [steps for steps in planned if steps is not None]
    return RunLength(summary, tokens, images, min(ends, default=None), images_seen)


def _means(train: TrainConfig, plan: Plan, summary: PlanSummary) -> RunMeans:
    """Return the means over the images of the run; over the first epoch, if it has no end."""
    of_epoch = summary.images * summary.views
    means = RunMeans(summary.tokens / max(of_epoch, 1), summary.images_per_pack)
    if not drop_rate_moves(plan):
        return means
    for _ in range(_ROUNDS):  # the images of a number of steps depend on the means over them
        per_step = train.packs_per_step * means.images_per_pack
        limits = (
            None if train.max_steps is None else train.max_steps * per_step,
            None if train.max_epochs is None else train.max_epochs * of_epoch,
            train.max_images,
            None if train.max_tokens is None else train.max_tokens / means.tokens_per_image,
        )
        ends = [images for images in limits if images is not None]
        if not ends:
            return means
        means = means_over_run(plan, min(ends))
    return means


def length_rows(length: RunLength, images_per_s: float | None) -> Iterator[tuple[str, str]]:
    """Yield what there is to say of a whole run: its length, and the time that it takes.

    Args:
        length: the length of the run.
        images_per_s: rate of all ranks together; None: not known.

    Returns:
        Pairs of a subject and a finding.
    """
    if length.steps is None or length.epochs is None or length.images is None:
        yield "the run", "has no end: set train.max_steps, max_images, max_tokens or max_epochs"
        return
    epochs = f"{length.epochs:.3g}" if length.epochs < 100 else f"{length.epochs:,.0f}"
    yield "the run", f"{length.steps:,} steps: {epochs} epochs, {length.images:,.0f} images"
    if images_per_s is None:
        yield (
            "time",
            "--images-per-s N reckons it (img/s, as a run prints it); `zeta train CONFIG "
            "--dry-run` estimates it for a GPU",
        )
    else:
        seconds = length.images / images_per_s
        yield "time", f"{duration(seconds)} at {images_per_s:g} images/s, without evaluation"


def duration(seconds: float) -> str:
    """Return a time in words, in minutes, hours or days."""
    if seconds < 2 * 3600:
        return f"{seconds / 60:,.1f} minutes"
    return (
        f"{seconds / 3600:,.1f} hours" if seconds < 2 * _DAY_S else f"{seconds / _DAY_S:,.1f} days"
    )
