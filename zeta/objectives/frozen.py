"""The base of what runs beside the model in training, and never learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import nn

from zeta.models.layers import set_stream
from zeta.models.linear import Linear


class FrozenModule(nn.Module):
    """A module in evaluation mode whose parameters get no gradient, such as a teacher.

    It is called with a `PackedBatch`. It lies whole on every rank, and is no part of the model: it
    is neither optimized, sharded, saved nor exported.
    """

    def __init__(self) -> None:
        super().__init__()
        self.low_precision = False
        """Whether matrices are multiplied in bf16; `forward` turns autocast on for that."""

    def rows(self, grids: Sequence[tuple[int, int]], side: int) -> int:
        """Return the rows of its forward pass on whole images; here, their patches.

        Args:
            grids: rows and columns of patches of each image.
            side: pixels of a side of such a patch.
        """
        return sum(height * width for height, width in grids)

    def place(self, device: torch.device, dtype: torch.dtype | None) -> Self:
        """Go to a device; with bf16 matrices are kept and multiplied in it, as in the model.

        Args:
            device: of the model.
            dtype: bf16, or None for fp32.
        """
        self.low_precision = dtype is not None
        if dtype is not None:
            for layer in self.modules():
                if isinstance(layer, Linear):
                    layer.to(dtype)
            set_stream(self, dtype)
        return self.to(device)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)
