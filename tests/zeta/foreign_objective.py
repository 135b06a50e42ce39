"""An objective from outside of zeta: it learns the brightness of images, and needs no labels."""

from typing import ClassVar

import torch
import torch.distributed as dist

from zeta.objectives.base import DeclaredObjective


class Brightness(DeclaredObjective):
    """Squared error of output 0 against the mean pixel of each image, in [0, 1]."""

    targets: ClassVar[str] = "none"
    headline: ClassVar[None] = None

    @classmethod
    def head_outputs(cls, config):
        return 1

    def check(self, batch):
        pass

    def loss_sum(self, outputs, batch):
        return self._losses(outputs, batch).sum()

    def counts(self, outputs, batch):
        return {"close": (self._losses(outputs, batch) < 0.01).sum() - (batch.weights == 0).sum()}

    def tally(self):
        return MeanLoss(self)

    @staticmethod
    def _losses(outputs, batch):
        rows = batch.patches.float().mean(dim=1) / 255
        image_T = torch.repeat_interleave(batch.cu_seqlens.diff().long())
        sums = rows.new_zeros(len(batch.weights) + 1).index_add(0, image_T, rows)[:-1]
        brightness = sums / batch.cu_seqlens.diff()[:-1].clamp(min=1)
        return ((outputs[:, 0].float() - brightness) ** 2) * (batch.weights > 0)


class MeanLoss:
    def __init__(self, objective):
        self._objective, self._sums = objective, torch.zeros(2, dtype=torch.float64)

    def add(self, outputs, batch):
        loss = self._objective.loss_sum(outputs, batch)
        self._sums += torch.stack([(batch.weights > 0).sum(), loss]).double().cpu()

    def metrics(self):
        if dist.is_initialized():
            dist.all_reduce(self._sums)
        images, loss = self._sums.tolist()
        return {"images": images, "loss": loss / images} if images else {"images": 0.0}


class NotAnObjective:
    """Not derived from `DeclaredObjective`."""
