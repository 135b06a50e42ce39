"""Objectives: the losses that models are trained on, one file each behind `Objective`.

Imports `zeta.models` and below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from zeta.config_field import check_choice
from zeta.models.config import ModelConfig
from zeta.objectives.base import TARGETS, DeclaredObjective, Step
from zeta.objectives.classification import SigmoidClassification, SoftmaxClassification
from zeta.objectives.config import ObjectiveConfig
from zeta.objectives.distill import DistillObjective
from zeta.objectives.distill_added import (
    DistilledImageText,
    DistilledSigmoid,
    DistilledSoftmax,
)
from zeta.objectives.image_text import ImageTextObjective
from zeta.objectives.lejepa import LejepaObjective
from zeta.packed import PackedBatch


class PackLoss(Protocol):
    """The loss of a pack.

    It returns sums, not means: the engine divides by the number of images of the whole step, over
    all packs of all ranks, so that every image has the same weight in any pack. The outputs are
    those of the model that belongs to the objective.
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
    """The counts of one pass over held-out packs, on each rank."""

    def add(self, outputs: Any, batch: PackedBatch) -> None:
        """Count a pack, on the device of its `outputs`; ranks may count different numbers."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return `images` and, if there are any, means over those of all ranks, by name.

        Every rank calls this, after at least one `add`. NOTE: a collective.
        """
        ...


class Objective(Protocol):
    """The part of an objective that evaluation uses; training also needs a loss.

    See `PackObjective` and `JointObjective` for the loss, and `zeta.objectives.base` for the rest.
    """

    @property
    def headline(self) -> str | None:
        """The metric of its tally that ranks steps (higher is better); None: no ranking."""
        ...

    def check(self, batch: PackedBatch) -> None:
        """Raise `RunError`, naming the sample, if a target in `batch` (on the host) is invalid."""
        ...

    def tally(self) -> Tally:
        """Return an empty tally of held-out packs."""
        ...


class StepHooks(Protocol):
    """The calls before training and around each optimizer step, which may do nothing."""

    def place(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Put what it holds besides the model where training runs; `dtype` None: fp32."""
        ...

    def facts(self) -> Mapping[str, str]:
        """Return what a checkpoint names, and a resume must find unchanged, by config field."""
        ...

    def start(self, model: nn.Module) -> None:
        """Set weights that depend on others, once, before the first step; they may be sharded."""
        ...

    def begin_step(self, step: Step) -> None:
        """Prepare for an optimizer step."""
        ...

    def finish_step(self, model: nn.Module, step: Step) -> None:
        """Follow a step that changed the weights of `model`, which may be sharded."""
        ...


@runtime_checkable
class PackObjective(Objective, StepHooks, PackLoss, Protocol):
    """An objective in which the loss of an image does not depend on the others."""


@runtime_checkable
class JointObjective(Objective, StepHooks, Protocol):
    """An objective in which the loss of an image depends on all images of the step.

    The engine runs all packs forward before it runs the first one backward.
    """

    def join(self, outputs: Sequence[Any], batches: Sequence[PackedBatch]) -> Sequence[PackLoss]:
        """Return the loss of each of this rank's packs, given the outputs of all of them.

        Args:
            outputs: outputs for the packs of this rank, without a graph. Every rank has the same
                number of packs.
            batches: the packs, on the device.

        Returns:
            Losses whose sum over all packs of all ranks is the loss of the step. The gradient of
            each with respect to the outputs of its pack is that of the whole step's loss. NOTE: a
            collective.
        """
        ...


OBJECTIVES: dict[str, type[DeclaredObjective]] = {
    "softmax": SoftmaxClassification,
    "sigmoid": SigmoidClassification,
    "siglip": ImageTextObjective,
    "clip": ImageTextObjective,
    "lejepa": LejepaObjective,
    "distill": DistillObjective,
    "softmax+distill": DistilledSoftmax,
    "sigmoid+distill": DistilledSigmoid,
    "siglip+distill": DistilledImageText,
    "clip+distill": DistilledImageText,
}
"""Objectives by `objective.kind`."""


def objective_class(kind: str) -> type[DeclaredObjective]:
    """Return the objective of a name in `OBJECTIVES`, or the class at package.module:Class.

    Raises:
        ValueError: no such objective; the message lists the available ones.
    """
    module, colon, name = kind.partition(":")
    if not colon:
        check_choice("objective.kind", kind, OBJECTIVES)
        return OBJECTIVES[kind]
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"objective.kind is {kind!r}, which cannot be imported ({error}): give "
            "package.module:Class of a module on the Python path"
        ) from error
    if not (isinstance(found, type) and issubclass(found, DeclaredObjective)):
        raise ValueError(
            f"objective.kind is {kind!r}, which is not a class derived from "
            "zeta.objectives.base.DeclaredObjective"
        )
    check_choice(f"{kind}.targets", found.targets, TARGETS)
    return found


def build_objective(config: ObjectiveConfig, num_outputs: int) -> PackObjective | JointObjective:
    """Build the objective that `config.kind` names, for a head of `num_outputs` outputs.

    Raises:
        ValueError: no such objective, or one without the methods of a loss.
    """
    objective = objective_class(config.kind)(config, num_outputs)
    if isinstance(objective, PackObjective | JointObjective):
        return objective
    raise ValueError(
        f"objective.kind is {config.kind!r}, which lacks methods of a loss: see "
        "zeta.objectives.PackObjective and JointObjective"
    )


def build_for_objective(model: ModelConfig, objective: ObjectiveConfig, seed: int) -> nn.Module:
    """Build the model that a run trains, as its objective declares it.

    Args:
        model: config of the encoder, with the number of outputs that the objective requires.
        objective: config of the objective, resolved with the shards.
        seed: seed of the initial weights.
    """
    return objective_class(objective.kind).build_model(model, objective, seed)
