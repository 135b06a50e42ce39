"""Distillation: learn what a frozen teacher says of whole images, from the patches that are kept.

The student's pooled embedding, and its feature of every kept patch, are mapped linearly to the
width of the teacher and compared with the teacher's: by cosine (as in AM-RADIO, Ranzinger et al.
2023, arXiv 2312.06709), or by smooth L1 after the teacher's values are normalised over channels
(Wei et al. 2022, arXiv 2205.14141). The loss of an image is a sum of both, the second as the mean
over its kept patches, so a step's loss does not depend on ranks or packs. Where patches differ in
size, see `zeta.objectives.whole_images`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from zeta.models.config import ModelConfig, build_model
from zeta.models.packed_vit import PackedViT
from zeta.objectives.base import DeclaredObjective, refuse_label_smoothing
from zeta.objectives.config import ObjectiveConfig
from zeta.objectives.distill_checks import (
    check_fit,
    check_no_factor,
    check_pooling,
    check_weights,
)
from zeta.objectives.distill_model import DistillModel, DistillOutputs
from zeta.objectives.teacher import (
    FIELD,
    Teacher,
    TeacherOutputs,
    check_finite,
    check_teacher_named,
    load_teacher,
    outline_teacher,
)
from zeta.objectives.whole_images import image_of_rows
from zeta.packed import PackedBatch

POOLED, TOKENS = "pooled_loss", "token_loss"
"""The distances of pooled embeddings and of tokens."""
DISTILL, BASE = "distill_loss", "base_loss"
"""The parts of the loss where another objective is learned too: the weighted sum of the distances,
and the loss of the other objective."""


class Distillation(DeclaredObjective):
    """What all distillations share: the teacher, and the distance to it."""

    encoder = "image."
    whole_images = True

    def __init__(self, config: ObjectiveConfig, num_outputs: int) -> None:
        super().__init__(config, num_outputs)
        self.config = config.distill
        self._teacher: Teacher | None = None
        self._digest = ""
        self._counted: tuple[PackedBatch, dict[str, Tensor]] | None = None

    @classmethod
    def check_named(cls, config: ObjectiveConfig) -> None:
        """Raise ValueError if no teacher is named."""
        check_teacher_named(config.distill.teacher)

    @classmethod
    def completed(cls, config: ObjectiveConfig, fit: str) -> ObjectiveConfig:
        """Return the config with the channels of the teacher.

        Raises:
            ValueError: the teacher is missing or damaged, or cannot serve for such images.
        """
        distill = config.distill
        teacher = outline_teacher(distill.teacher)
        check_fit(teacher.encoder, distill.teacher, fit)
        dim = teacher.dim
        if distill.dim not in (None, dim):
            raise ValueError(
                f"{FIELD} is {distill.teacher}, which has {dim} channels, but "
                f"objective.distill.dim is {distill.dim}, that of the teacher of before: give that "
                "one, or leave objective.distill.dim out"
            )
        return replace(config, distill=replace(distill, dim=dim))

    @classmethod
    def outline_beside(cls, config: ObjectiveConfig) -> Teacher:
        """Return the teacher on the meta device."""
        return outline_teacher(config.distill.teacher)

    def place(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Load the teacher, and put it on the device.

        Raises:
            ValueError: it cannot be loaded, or what it says is not finite.
        """
        teacher, config = self.teacher.place(device, dtype), self.config
        check_finite(teacher, config.teacher, pooled=config.pooled > 0, tokens=config.tokens > 0)

    def facts(self) -> dict[str, str]:
        """Return the digest of the teacher."""
        _ = self.teacher
        return {FIELD: self._digest}

    @property
    def teacher(self) -> Teacher:
        """The teacher, loaded when it is first asked for."""
        if self._teacher is None:
            self._teacher, self._digest = load_teacher(self.config.teacher)
        return self._teacher

    @teacher.setter
    def teacher(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def distance(self, outputs: DistillOutputs, batch: PackedBatch) -> Tensor:
        """Return the weighted sum of both distances over the images of weight 1."""
        sums = distances(outputs, self.teacher(batch), batch, self.config.loss)
        self._counted = batch, {name: value.detach() for name, value in sums.items()}
        return self.weighted(sums)

    def weighted(self, sums: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of both distances, given their sums by name."""
        weights = {POOLED: self.config.pooled, TOKENS: self.config.tokens}
        return torch.stack([weights[name] * value for name, value in sums.items()]).sum()

    def distance_sums(self, outputs: DistillOutputs, batch: PackedBatch) -> Mapping[str, Tensor]:
        """Return the sums of both distances; those of the last pack are known from its loss."""
        counted, self._counted = self._counted, None
        if counted is not None and counted[0] is batch:
            return counted[1]
        return distances(outputs, self.teacher(batch), batch, self.config.loss)


class DistillObjective(Distillation):
    """The distance of a student to its teacher, alone."""

    @classmethod
    def check_config(cls, config: ObjectiveConfig) -> None:
        """Raise ValueError for label smoothing, a factor, and if nothing would be learned."""
        refuse_label_smoothing(config)
        check_weights(config.distill)
        check_no_factor(config.distill)

    @classmethod
    def head_outputs(cls, config: ObjectiveConfig) -> int | None:
        """Return 1: the head has no part in training, and a model has one."""
        return 1

    @classmethod
    def build_model(cls, model: ModelConfig, config: ObjectiveConfig, seed: int) -> nn.Module:
        """Build the encoder with its maps.

        Raises:
            ValueError: nothing would train the pooling.
        """
        image = build_model(model, seed)
        check_pooling(image, config.distill)
        return DistillModel(image, config.distill, teacher_flops(config, image), seed=seed)

    def check(self, batch: PackedBatch) -> None:
        """Accept every pack: there are no targets in it."""

    def loss_sum(self, outputs: DistillOutputs, batch: PackedBatch) -> Tensor:
        """Return the sum of the losses of the images of weight 1."""
        return self.distance(outputs, batch)

    def counts(self, outputs: DistillOutputs, batch: PackedBatch) -> Mapping[str, Tensor]:
        """Return the sums of both distances over the images of weight 1."""
        return self.distance_sums(outputs, batch)

    def tally(self) -> Any:
        """Return an empty tally of held-out packs."""
        return DistillTally(self)


def teacher_flops(config: ObjectiveConfig, image: PackedViT) -> Callable[[PackedBatch], float]:
    """Return a count of a teacher's operations on a pack; its folder is read when it is called."""
    path, side = config.distill.teacher, image.patch_size

    @cache
    def outline() -> Teacher:
        return outline_teacher(path)

    return lambda pack: outline().flops(pack, side)


def distances(
    outputs: DistillOutputs, targets: TeacherOutputs, batch: PackedBatch, kind: str
) -> dict[str, Tensor]:
    """Return the distances that are learned, by name, summed over the images of weight 1.

    Args:
        outputs: maps of the student's values; those that are None are left out.
        targets: what the teacher says.
        batch: the pack.
        kind: cosine or smooth_l1.
    """
    counted_I, sums = batch.weights > 0, dict[str, Tensor]()
    if outputs.pooled is not None:
        losses_I = _distance(outputs.pooled, targets.pooled, kind)
        sums[POOLED] = torch.where(counted_I, losses_I, 0.0).sum()
    if outputs.tokens is not None:
        kept_T = batch.coords[:, 0] >= 0
        losses_T = torch.where(kept_T, _distance(outputs.tokens, targets.tokens, kind), 0.0)
        image_T = image_of_rows(batch)
        zeros_S = losses_T.new_zeros(len(batch.weights) + 1)
        sums_I = zeros_S.index_add(0, image_T, losses_T)[:-1]
        kept_I = zeros_S.index_add(0, image_T, kept_T.to(losses_T.dtype))[:-1]
        sums[TOKENS] = torch.where(counted_I, sums_I / kept_I.clamp(min=1), 0.0).sum()
    return sums


def _distance(found_nC: Tensor, wanted_nC: Tensor, kind: str) -> Tensor:
    """Return the distance [n] of each row."""
    if kind == "cosine":
        return 1 - F.cosine_similarity(found_nC, wanted_nC, dim=-1)
    wanted_nC = F.layer_norm(wanted_nC, wanted_nC.shape[-1:])
    return F.smooth_l1_loss(found_nC, wanted_nC, reduction="none").mean(-1)


class DistillTally:
    """Mean distances over held-out images, and the metrics of another objective, if there is one.

    Args:
        objective: the distillation.
        base: tally of the other objective.
    """

    def __init__(self, objective: Distillation, base: Any = None) -> None:
        self._objective, self._base = objective, base
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, outputs: DistillOutputs, batch: PackedBatch) -> None:
        """Count the images of weight 1 of a pack."""
        if self._base is not None:
            self._base.add(outputs.base, batch)
        loss = self._objective.distance(outputs, batch)
        sums = {"images": (batch.weights > 0).sum(), DISTILL: loss}
        for name, value in (sums | dict(self._objective.distance_sums(outputs, batch))).items():
            self._sums[name] = self._sums.get(name, 0) + value.double()

    def metrics(self) -> dict[str, float]:
        """Return `images`, and the means over those of all ranks.

        They are `loss`, which is what training minimises, `pooled_loss` and `token_loss`; beside
        another objective also `distill_loss`, and as `base_loss` the other one's loss. Every rank
        calls this after at least one `add`. NOTE: a collective.
        """
        summed = torch.stack(list(self._sums.values()))
        if dist.is_initialized():
            dist.all_reduce(summed)
        own = dict(zip(self._sums, summed.tolist(), strict=True))
        images = own.pop("images")
        base: dict[str, float] = {} if self._base is None else self._base.metrics()
        if images == 0:
            return {"images": 0.0}
        means = {name: value / images for name, value in own.items()}
        if self._base is None:
            means["loss"] = means.pop(DISTILL)
        else:
            means[BASE] = base["loss"]
            means["loss"] = means[BASE] + self._objective.config.weight * means[DISTILL]
        return {"images": images} | base | means
