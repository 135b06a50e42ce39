"""Classification: softmax cross-entropy, and sigmoid (one yes or no for each class)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from zeta.exit_codes import RunError
from zeta.objectives.base import DeclaredObjective
from zeta.objectives.config import ObjectiveConfig
from zeta.packed import PackedBatch


class _Classification(DeclaredObjective, ABC):
    """Base of both losses: the label check, the count of correct predictions, the tally."""

    headline = "top1"
    learns_mixed = True

    def __init__(self, config: ObjectiveConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.num_classes = num_classes
        self.label_smoothing = config.label_smoothing

    def check(self, batch: PackedBatch) -> None:
        """Raise `RunError` if an image to learn from has no label in [0, num_classes).

        If images have lists of labels, -1 ends a list, and an empty list is valid too.
        """
        outside = (batch.labels < 0) | (batch.labels >= self.num_classes)
        if batch.label_sets is not None:
            outside = (batch.label_sets >= self.num_classes).any(dim=1)
        bad = torch.nonzero(outside & (batch.weights > 0))
        if bad.numel():
            row = int(bad[0])
            raise RunError(
                f"sample {int(batch.sample_ids[row])} has label {_largest(batch, row)}; labels "
                f"must be 0 to {self.num_classes - 1} (model.num_classes = {self.num_classes}). "
                "Correct the sample's .cls member or model.num_classes"
            )

    def loss_sum(self, outputs: Tensor, batch: PackedBatch) -> Tensor:
        """Return the sum of the losses, in nats, over the weighted images of [I, K] outputs."""
        return self._image_losses(outputs, batch, self.label_smoothing).sum()

    def tally(self) -> ClassificationTally:
        """Return an empty tally of held-out packs."""
        return ClassificationTally(self)

    def counts(self, outputs: Tensor, batch: PackedBatch) -> Mapping[str, Tensor]:
        """Return top1: weighted images whose largest output is their label, or one of them.

        Of an image mixed of two, the label is that with the larger share.
        """
        if batch.mixed_with is not None and batch.own_shares is not None:
            own = torch.arange(len(batch.labels), device=batch.labels.device)
            mostly_other = (batch.mixed_with >= 0) & (batch.own_shares < 0.5)
            batch = _with_labels_of(batch, torch.where(mostly_other, batch.mixed_with, own))
        return {"top1": self._hits(outputs.argmax(dim=-1, keepdim=True), batch).sum()}

    def held_out_sums(self, outputs: Tensor, batch: PackedBatch) -> Mapping[str, Tensor]:
        """Return the sums over held-out images: the loss of their true labels, top1 and top5."""
        return {name: row.sum() for name, row in self.held_out_rows(outputs, batch).items()}

    def held_out_rows(self, outputs: Tensor, batch: PackedBatch) -> Mapping[str, Tensor]:
        """Return the terms of `held_out_sums` for each image [I]; 0 if its weight is 0."""
        best = outputs.argmax(dim=-1, keepdim=True)
        # Among equal outputs argmax and topk may choose differently.
        near = torch.cat([best, outputs.topk(min(5, self.num_classes), dim=-1).indices], dim=1)
        return {
            "loss": self._image_losses(outputs, batch, smoothing=0.0),
            "top1": self._hits(best, batch),
            "top5": self._hits(near, batch),
        }

    @staticmethod
    def _hits(guesses: Tensor, batch: PackedBatch) -> Tensor:
        """Return whether each weighted image has a label among its guesses [I, n]: [I]."""
        labels = batch.labels[:, None] if batch.label_sets is None else batch.label_sets
        hit = (guesses[:, :, None] == labels[:, None, :]).any(dim=2).any(dim=1)
        return hit & (batch.weights > 0)

    def _image_losses(self, outputs: Tensor, batch: PackedBatch, smoothing: float) -> Tensor:
        outputs = outputs.float()
        losses = self._losses(outputs, batch, smoothing)
        if batch.mixed_with is not None and batch.own_shares is not None:
            # Cross-entropy is linear in the target: a mixture of targets is one of losses.
            others = _with_labels_of(batch, batch.mixed_with.clamp(min=0))
            losses = torch.lerp(self._losses(outputs, others, smoothing), losses, batch.own_shares)
        # where, not a product with the weight: 0 * inf of an unused row would be NaN.
        return torch.where(batch.weights > 0, losses * batch.weights, 0.0)

    @abstractmethod
    def _losses(self, outputs: Tensor, batch: PackedBatch, smoothing: float) -> Tensor:
        """Return the losses [I], in nats, of [I, K] float32 outputs; unused rows are arbitrary."""


def _with_labels_of(batch: PackedBatch, rows: Tensor) -> PackedBatch:
    """Return the pack with the labels of other rows [I] of it."""
    sets = None if batch.label_sets is None else batch.label_sets[rows]
    return replace(batch, labels=batch.labels[rows], label_sets=sets)


def _largest(batch: PackedBatch, row: int) -> int:
    return int(batch.labels[row] if batch.label_sets is None else batch.label_sets[row].max())


class SoftmaxClassification(_Classification):
    """Cross-entropy of the softmax over classes, with label smoothing (Szegedy et al. 2016)."""

    targets = "label"

    def check(self, batch: PackedBatch) -> None:
        """Raise `RunError` for an invalid label, and for images that have lists of labels."""
        if batch.label_sets is not None:
            raise RunError(
                "the packs carry lists of labels, and objective.kind=softmax learns one class an "
                "image: set objective.kind=sigmoid"
            )
        super().check(batch)

    def _losses(self, outputs: Tensor, batch: PackedBatch, smoothing: float) -> Tensor:
        labels = batch.labels.clamp(0, self.num_classes - 1)  # unused rows carry -1
        return F.cross_entropy(outputs, labels, reduction="none", label_smoothing=smoothing)


class SigmoidClassification(_Classification):
    """Binary cross-entropy of each class, summed over classes (Beyer et al. 2020).

    An image may have any number of labels. Smoothing s gives each of them 1 - s + s/K and every
    other class s/K.
    """

    targets = "labels"

    def _losses(self, outputs: Tensor, batch: PackedBatch, smoothing: float) -> Tensor:
        labels = batch.labels[:, None] if batch.label_sets is None else batch.label_sets
        # A label of -1 gets a column of its own, which is cut off.
        targets = outputs.new_zeros(len(labels), self.num_classes + 1, dtype=torch.float32)
        targets = targets.scatter(1, torch.where(labels < 0, self.num_classes, labels), 1.0)
        targets = targets[:, : self.num_classes]
        targets = targets * (1.0 - smoothing) + smoothing / self.num_classes
        losses = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        return losses.sum(dim=-1)


class ClassificationTally:
    """Sums of loss and counts over held-out images."""

    def __init__(self, objective: _Classification) -> None:
        self._objective = objective
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, outputs: Tensor, batch: PackedBatch) -> None:
        """Count the images of weight 1 of a pack."""
        sums = {"images": (batch.weights > 0).sum()}
        for name, value in (sums | dict(self._objective.held_out_sums(outputs, batch))).items():
            self._sums[name] = self._sums.get(name, 0) + value.double()

    def metrics(self) -> dict[str, float]:
        """Return `images`, and the means `loss`, `top1` and `top5` over the images of all ranks.

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
