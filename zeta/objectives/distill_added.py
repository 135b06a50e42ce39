"""Distillation added to classification, or to the comparison of images and captions.

The loss of a step is that of the other objective plus `objective.distill.weight` times the distance
to the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from zeta.models.config import ModelConfig, build_model
from zeta.models.text_tower import TextTower
from zeta.objectives.base import DeclaredObjective
from zeta.objectives.classification import SigmoidClassification, SoftmaxClassification
from zeta.objectives.config import ObjectiveConfig
from zeta.objectives.distill import (
    BASE,
    DISTILL,
    Distillation,
    DistillTally,
    teacher_flops,
)
from zeta.objectives.distill_checks import check_factor, check_weights
from zeta.objectives.distill_model import (
    DistillImageTextModel,
    DistillModel,
    DistillOutputs,
)
from zeta.objectives.image_text import ImageTextObjective
from zeta.objectives.joined import JoinedPack
from zeta.packed import PackedBatch


def without_distill(config: ObjectiveConfig) -> ObjectiveConfig:
    """Return the config of the other objective of a sum."""
    return replace(config, kind=config.kind.partition("+")[0])


class _Added(Distillation):
    """The sum of another objective and distillation; what is declared is the other one's."""

    other: ClassVar[type[DeclaredObjective]]

    def __init__(self, config: ObjectiveConfig, num_outputs: int) -> None:
        super().__init__(config, num_outputs)
        self.base: Any = self.other(without_distill(config), num_outputs)

    @classmethod
    def check_config(cls, config: ObjectiveConfig) -> None:
        """Raise ValueError for an option that either lacks, and if no teacher would be heard."""
        cls.other.check_config(without_distill(config))
        check_weights(config.distill)
        check_factor(config.distill)

    @classmethod
    def head_outputs(cls, config: ObjectiveConfig) -> int | None:
        """Return the outputs of the head that the other objective wants."""
        return cls.other.head_outputs(config)

    def check(self, batch: PackedBatch) -> None:
        """Raise `RunError` for a target that the other objective refuses."""
        self.base.check(batch)

    def parts(
        self, base_loss: Tensor, outputs: DistillOutputs, batch: PackedBatch
    ) -> dict[str, Tensor]:
        """Return the sums of both losses and of both distances, given the other one's loss."""
        sums = self.distance_sums(outputs, batch)
        return {BASE: base_loss, DISTILL: self.weighted(sums), **sums}

    def tally(self) -> DistillTally:
        """Return an empty tally of held-out packs, for both."""
        return DistillTally(self, self.base.tally())


class _AddedToClasses(_Added):
    """Distillation added to classification."""

    headline = "top1"

    @classmethod
    def build_model(cls, model: ModelConfig, config: ObjectiveConfig, seed: int) -> nn.Module:
        """Build the encoder, whose head learns too, with its maps."""
        image = build_model(model, seed)
        beside = teacher_flops(config, image)
        return DistillModel(image, config.distill, beside, classifies=True, seed=seed)

    def loss_sum(self, outputs: DistillOutputs, batch: PackedBatch) -> Tensor:
        """Return the sum of both losses over the images of weight 1."""
        loss: Tensor = self.base.loss_sum(outputs.base, batch)
        return loss + self.config.weight * self.distance(outputs, batch)

    def counts(self, outputs: DistillOutputs, batch: PackedBatch) -> Mapping[str, Tensor]:
        """Return the correct predictions, and the sums of both losses and of both distances."""
        loss = self.base.loss_sum(outputs.base, batch)
        return {**self.base.counts(outputs.base, batch), **self.parts(loss, outputs, batch)}


class DistilledSoftmax(_AddedToClasses):
    """Distillation added to `SoftmaxClassification`."""

    targets, other = "label", SoftmaxClassification


class DistilledSigmoid(_AddedToClasses):
    """Distillation added to `SigmoidClassification`."""

    targets, other = "labels", SigmoidClassification


class DistilledImageText(_Added):
    """Distillation added to SigLIP or CLIP."""

    targets, headline, other = "caption", ImageTextObjective.headline, ImageTextObjective

    @classmethod
    def build_model(cls, model: ModelConfig, config: ObjectiveConfig, seed: int) -> nn.Module:
        """Build the image encoder with its maps, and the text encoder."""
        image, kind = build_model(model, seed), without_distill(config).kind
        text = TextTower(**ImageTextObjective.text_arguments(config))
        beside = teacher_flops(config, image)
        return DistillImageTextModel(image, text, kind, config.distill, beside, seed)

    @classmethod
    def text_arguments(cls, config: ObjectiveConfig) -> dict[str, Any]:
        """Return the constructor arguments of the text encoder."""
        return ImageTextObjective.text_arguments(config)

    def join(
        self, outputs: Sequence[DistillOutputs], batches: Sequence[PackedBatch]
    ) -> list[_Both]:
        """Return the loss of each of this rank's packs. NOTE: a collective."""
        joined = self.base.join([output.base for output in outputs], batches)
        return [_Both(pack, self) for pack in joined]


class _Both:
    """The loss of one pack: its part of the comparison of all pairs, and its distance."""

    def __init__(self, joined: JoinedPack, distill: DistilledImageText) -> None:
        self._joined, self._distill = joined, distill

    def loss_sum(self, outputs: DistillOutputs, batch: PackedBatch) -> Tensor:
        """Return the sum of both."""
        distance = self._distill.distance(outputs, batch)
        return self._joined.loss_sum(outputs.base, batch) + self._distill.config.weight * distance

    def counts(self, outputs: DistillOutputs, batch: PackedBatch) -> Mapping[str, Tensor]:
        """Return the named sums of both."""
        own = self._distill.parts(self._joined.loss, outputs, batch)
        return {**self._joined.counts(outputs.base, batch), **own}
