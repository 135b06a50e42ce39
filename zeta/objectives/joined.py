"""The loss of a pack in a joint objective, with its dependence on all other packs computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zeta.packed import PackedBatch


@dataclass(frozen=True)
class JoinedPack:
    """The loss of one pack of a step whose images depend on each other."""

    loss: Tensor
    """Scalar sum of the losses of the pack's images."""
    gradient: Sequence[Tensor | None]
    """Gradient of the step's loss sum with respect to each output of this pack; None: it has no
    part in the loss."""
    sums: Mapping[str, Tensor]
    """Named sums over the pack's images."""

    def loss_sum(self, outputs: Sequence[Tensor], batch: PackedBatch) -> Tensor:
        """Return the pack's loss; its gradient is that of the whole step by the pack's outputs."""
        parts = zip(outputs, self.gradient, strict=True)
        linear = [(output * gradient).sum() for output, gradient in parts if gradient is not None]
        through = torch.stack(linear).sum()
        return self.loss + (through - through.detach())

    def counts(self, outputs: Sequence[Tensor], batch: PackedBatch) -> Mapping[str, Tensor]:
        """Return the named sums."""
        return self.sums


def put_back(rows: Tensor, mask: Tensor) -> Tensor:
    """Return [I, D] with `rows` where `mask` is set, and zero elsewhere."""
    return rows.new_zeros(len(mask), rows.shape[1]).masked_scatter(mask[:, None], rows)
