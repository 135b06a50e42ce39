"""Objectives: what the model learns to predict, one file each behind `Objective`.

Imports `zeta.models` and below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from zeta.objectives.classification import SigmoidClassification, SoftmaxClassification
from zeta.objectives.config import ObjectiveConfig
from zeta.objectives.image_text import ImageTextObjective
from zeta.packed import PackedBatch


class PackLoss(Protocol):
    """The loss of a pack.

    Sums, not means: the engine divides by the images of the whole step, over all packs of all
    ranks, so that every image weighs the same whatever pack it is in. Outputs are what the model
    that belongs to the objective returns.
    """

    def loss_sum(self, outputs: Any, batch: PackedBatch) -> Tensor:
        """Return the scalar sum of the losses of all images of weight 1.

        Args:
            outputs: the model's output for `batch`; for classification [I, K] logits.
            batch: the pack, on the device of `outputs`.
        """
        ...

    def counts(self, outputs: Any, batch: PackedBatch) -> Mapping[str, Tensor]:
        """Return named scalar sums over the images of weight 1 (top1: correct predictions)."""
        ...


class Tally(Protocol):
    """The account of one pass over held-out packs, on each rank."""

    def add(self, outputs: Any, batch: PackedBatch) -> None:
        """Count a pack, on the device of its `outputs`; ranks may count different numbers."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return `images` and, if there are any, means over those of all ranks, by name.

        Every rank calls this, after at least one `add`. NOTE: a collective.
        """
        ...


class Objective(Protocol):
    """What every objective can do; it is either a `PackLoss` or a `JointObjective` besides."""

    headline: str
    """The metric of its tally that tells which step is best; the higher, the better."""

    def check(self, batch: PackedBatch) -> None:
        """Raise `RunError`, naming the sample, if a target in `batch` (on the host) is invalid."""
        ...

    def tally(self) -> Tally:
        """Return an empty account of held-out packs."""
        ...


@runtime_checkable
class PackObjective(Objective, PackLoss, Protocol):
    """An objective in which the loss of an image does not depend on the others."""


@runtime_checkable
class JointObjective(Objective, Protocol):
    """An objective in which the loss of an image depends on all images of the step.

    The engine runs all packs forward before it runs the first one backward.
    """

    def join(self, outputs: Sequence[Any], batches: Sequence[PackedBatch]) -> Sequence[PackLoss]:
        """Return the loss of each of this rank's packs, given the outputs of all of them.

        Args:
            outputs: of the packs of this rank, without a graph. Every rank has as many packs.
            batches: the packs, on the device.

        Returns:
            Losses whose sum over all packs of all ranks is that of the step, and whose gradient
            by the outputs of their pack is that of the whole step. NOTE: a collective.
        """
        ...


OBJECTIVES: dict[str, Callable[[ObjectiveConfig, int], PackObjective | JointObjective]] = {
    "softmax": SoftmaxClassification,
    "sigmoid": SigmoidClassification,
    "siglip": ImageTextObjective,
    "clip": ImageTextObjective,
}


def build_objective(config: ObjectiveConfig, num_classes: int) -> PackObjective | JointObjective:
    """Build the objective that `config.kind` names, for a head of `num_classes` outputs."""
    return OBJECTIVES[config.kind](config, num_classes)
