"""Evaluation on held-out packs: every image once, on any number of ranks.

Ranks may have different numbers of packs. Before each forward the ranks agree, in one small
collective, whether any has a pack left, has failed, or was asked to stop. So all run the same
number of forwards, which at ZeRO-3 are collectives themselves, and can stop between two packs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from zeta.distributed import World
from zeta.exit_codes import ExitCode, RunError
from zeta.objectives import Objective
from zeta.packed import PackedBatch, Rejected, StepSource
from zeta.run.signals import agreed_stop, stop_votes


@dataclass(frozen=True)
class HeldOut:
    """All held-out images, at one size."""

    tokens: int | None
    """Token budget of an image, in the names of the scores; None: the size of training."""
    images: int
    """Number of images to score, over all ranks."""
    unusable: int
    """Number of images that are known to be unusable before any is read."""
    fingerprint: str
    """Digest of the images, to recognise evaluations on the same images."""
    open: Callable[[], StepSource]
    """Returns the packs of this rank for one evaluation; the lanes end after one pass."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model on all held-out images, the same on every rank."""

    scores: Mapping[str, float]
    """Means over the images by name, `loss` and the objective's own."""
    images: int
    """Images that were scored, each once."""
    rejected: int
    """Images that could not be decoded."""
    rejected_here: tuple[Rejected, ...]
    """Images that this rank could not decode, with the reasons."""


def evaluate(
    predict: Callable[[PackedBatch], Any],
    objective: Objective,
    source: StepSource,
    world: World,
    *,
    requested: Callable[[], ExitCode | None] = lambda: None,
    show: Callable[[int], None] = lambda images: None,
    what: str = "held-out images",
) -> Evaluation | ExitCode:
    """Score every image of a source that ends; every rank calls this.

    Args:
        predict: the model in evaluation mode: returns the outputs for a pack on the device.
        objective: checks the targets and tallies the scores.
        source: this rank's packs; the lanes end after one pass.
        world: the ranks.
        requested: returns the exit code if this rank was asked to stop, else None.
        show: called with the number of images that all ranks have scored so far.
        what: name of the images in messages.

    Returns:
        The evaluation, or the exit code if a rank was asked to stop before the end.

    Raises:
        RunError: a target is invalid, or no image at all could be decoded.
        OSError, RuntimeError: a shard could not be read, on this rank or on another one.
    """
    tally, rejected, done = objective.tally(), list[Rejected](), 0
    with closing(_packs_of_rank(source, objective, rejected)) as packs, torch.no_grad():
        while True:
            pack, is_spare, failure = None, True, None
            if requested() is None:
                try:
                    pack, is_spare = next(packs)
                except (RunError, OSError, ValueError, RuntimeError) as error:
                    # A signal to the process group may have ended the loader's workers.
                    failure = error if requested() is None else None
            own = 0 if pack is None or is_spare else pack.num_images
            sums = world.sum([not is_spare, own, failure is not None, *stop_votes(requested())])
            if sums[2]:
                world.raise_together(failure)
            if (stop := agreed_stop(sums[3:])) is not None:
                return stop
            if not sums[0]:
                break
            assert pack is not None
            batch = pack.to(world.device)
            tally.add(predict(batch), batch)
            done += int(sums[1])
            show(done)
    total = int(world.sum([len(rejected)])[0])
    if done == 0:
        example = f", {rejected[0].key} among them: {rejected[0].reason}" if rejected else ""
        raise RunError(f"none of the {total:,} {what} could be used{example}")
    scores = tally.metrics()
    images = int(scores.pop("images"))
    return Evaluation(scores, images, total, tuple(rejected))


def _packs_of_rank(
    source: StepSource, objective: Objective, rejected: list[Rejected]
) -> Generator[tuple[PackedBatch, bool], None, None]:
    """Yield (pack, False) for this rank's packs with images, then (spare pack, True) for ever.

    The spare pack has weight 0, for the forwards in which only other ranks have images.
    """
    steps = source.steps(None)
    for step in steps:
        rejected.extend(step.rejected)
        for pack in step.packs:
            if pack.num_tokens:
                objective.check(pack)
                yield pack, False
        if not step.more:
            break
    spare = replace(step.packs[0], weights=torch.zeros_like(step.packs[0].weights))
    while True:
        yield spare, True
