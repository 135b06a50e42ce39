"""A linear layer that can compute with a low-precision copy of its weight.

Autocast casts every weight again in every forward pass, which is 9 to 11% of a training step on a
GPU. A copy is cast once after each update instead; gradients still reach the fp32 weight, and are
added up there in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """`torch.nn.Linear`, with an optional copy of the weight to compute with."""

    weight_copy: Tensor | None = None
    """Copy of the weight in another dtype; None: the weight itself is used."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        if self.weight_copy is None:
            return super().forward(x)
        weight: Tensor = _Copied.apply(self.weight, self.weight_copy)
        return F.linear(x, weight, self.bias)


class _Copied(torch.autograd.Function):
    """The copy in the forward pass; its gradient is that of the weight, in the weight's dtype."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        """Return the copy."""
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Cast the gradient."""
        return grads[0].to(ctx.dtype), None


class WeightCopies:
    """The copies of all linear layers of a model, which take 2 bytes a weight in bf16."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Give every `Linear` of `model` a copy of its weight in `dtype`."""
        self._layers = [module for module in model.modules() if isinstance(module, Linear)]
        self.copies: list[Tensor] = [layer.weight.detach().to(dtype) for layer in self._layers]
        for layer, copy in zip(self._layers, self.copies, strict=True):
            layer.weight_copy = copy

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the weights again, after they changed."""
        torch._foreach_copy_(self.copies, [layer.weight for layer in self._layers])
