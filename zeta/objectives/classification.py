"""Classification: softmax cross-entropy, and sigmoid (one yes or no for each class)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from zeta.exit_codes import RunError
from zeta.objectives.config import ObjectiveConfig
from zeta.packed import PackedBatch


class _Classification(ABC):
    """What both losses share: the label check, the count of correct predictions, the tally."""

    def __init__(self, config: ObjectiveConfig, num_classes: int) -> None:
        self.num_classes = num_classes
        self.label_smoothing = config.label_smoothing

    def check(self, batch: PackedBatch) -> None:
        """Raise `RunError` if an image to learn from has no label in [0, num_classes)."""
        outside = (batch.labels < 0) | (batch.labels >= self.num_classes)
        bad = torch.nonzero(outside & (batch.weights > 0))
        if bad.numel():
            row = int(bad[0])
            raise RunError(
                f"sample {int(batch.sample_ids[row])} has label {int(batch.labels[row])}; labels "
                f"must be 0 to {self.num_classes - 1} (model.num_classes = {self.num_classes}). "
                "Correct the sample's .cls member or model.num_classes"
            )

    @abstractmethod
    def loss_sum(self, outputs: Tensor, batch: PackedBatch) -> Tensor:
        """Return the sum of the losses, in nats, of the weighted images of [I, K] outputs."""

    def tally(self) -> ClassificationTally:
        """Return an empty account of held-out packs."""
        return ClassificationTally(self)

    def counts(self, outputs: Tensor, batch: PackedBatch) -> Mapping[str, Tensor]:
        """Return top1: the number of weighted images whose largest output is their label."""
        correct = (outputs.argmax(dim=-1) == batch.labels) & (batch.weights > 0)
        return {"top1": correct.sum()}

    @staticmethod
    def _weighted_sum(losses: Tensor, batch: PackedBatch) -> Tensor:
        # where, not a product with the weight: 0 * inf of an unused row would be NaN.
        return torch.where(batch.weights > 0, losses * batch.weights, 0.0).sum()


class SoftmaxClassification(_Classification):
    """Cross-entropy of the softmax over classes, with label smoothing (Szegedy et al. 2016)."""

    def loss_sum(self, outputs: Tensor, batch: PackedBatch) -> Tensor:
        """Return the sum of cross-entropies, in nats, of the weighted images of [I, K] outputs."""
        labels = batch.labels.clamp(0, self.num_classes - 1)  # unused rows carry -1
        losses = F.cross_entropy(
            outputs.float(), labels, reduction="none", label_smoothing=self.label_smoothing
        )
        return self._weighted_sum(losses, batch)


class SigmoidClassification(_Classification):
    """Binary cross-entropy of each class, summed over classes (Beyer et al. 2020).

    Smoothing s gives the label 1 - s + s/K and every other class s/K.
    """

    def loss_sum(self, outputs: Tensor, batch: PackedBatch) -> Tensor:
        """Return the sum over weighted images and all classes of [I, K] outputs, in nats."""
        labels = batch.labels.clamp(0, self.num_classes - 1)
        targets = F.one_hot(labels, self.num_classes).to(torch.float32)
        targets = targets * (1.0 - self.label_smoothing) + self.label_smoothing / self.num_classes
        losses = F.binary_cross_entropy_with_logits(outputs.float(), targets, reduction="none")
        return self._weighted_sum(losses.sum(dim=-1), batch)


class ClassificationTally:
    """Sums of loss and counts over held-out images."""

    def __init__(self, objective: _Classification) -> None:
        self._objective = objective
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, outputs: Tensor, batch: PackedBatch) -> None:
        """Count the images of weight 1 of a pack."""
        sums = {"images": (batch.weights > 0).sum()}
        sums["loss"] = self._objective.loss_sum(outputs, batch)
        for name, value in (sums | dict(self._objective.counts(outputs, batch))).items():
            self._sums[name] = self._sums.get(name, 0) + value.double()

    def metrics(self) -> dict[str, float]:
        """Return `images`, and the means `loss` and `top1` over the images of all ranks.

        Every rank calls this after at least one `add`. NOTE: a collective.
        """
        summed = torch.stack(list(self._sums.values()))
        if dist.is_initialized():
            dist.all_reduce(summed)
        images, *sums = summed.tolist()
        _, *names = self._sums
        if images == 0:
            return {"images": 0.0}
        return {"images": images} | {n: s / images for n, s in zip(names, sums, strict=True)}
