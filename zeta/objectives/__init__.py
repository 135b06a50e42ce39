"""Objectives: what the model learns to predict, one file each behind `Objective`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from zeta.objectives.classification import SigmoidClassification, SoftmaxClassification
from zeta.objectives.config import ObjectiveConfig
from zeta.packed import PackedBatch


class Objective(Protocol):
    """What the engine asks of an objective; it knows nothing else about the task.

    Sums, not means: the engine divides by the images of the whole step, over all packs of all
    ranks, so that every image weighs the same whatever pack it is in.
    """

    def check(self, batch: PackedBatch) -> None:
        """Raise `RunError`, naming the sample, if a target in `batch` (on the host) is invalid."""
        ...

    def loss_sum(self, outputs: Tensor, batch: PackedBatch) -> Tensor:
        """Return the scalar sum of the losses of all images of weight 1.

        Args:
            outputs: the model's output for `batch`, [I, K] float32.
            batch: the pack, on the device of `outputs`.
        """
        ...

    def counts(self, outputs: Tensor, batch: PackedBatch) -> Mapping[str, Tensor]:
        """Return named scalar sums over the images of weight 1 (top1: correct predictions)."""
        ...


OBJECTIVES: dict[str, Callable[[ObjectiveConfig, int], Objective]] = {
    "softmax": SoftmaxClassification,
    "sigmoid": SigmoidClassification,
}


def build_objective(config: ObjectiveConfig, num_classes: int) -> Objective:
    """Build the objective that `config.kind` names, for a head of `num_classes` outputs."""
    return OBJECTIVES[config.kind](config, num_classes)
