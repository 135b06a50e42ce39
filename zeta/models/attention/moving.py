"""Rows of a packed sequence that move to another layout and back, without scattered additions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Move:
    """Rows to take from one layout for another, and back. Letters: A, B rows of the layouts."""

    rows_B: Tensor
    """[B] row of the old layout for each row of the new one; any, if none belongs there."""
    rows_A: Tensor
    """[A] the same, back."""
    unused_B: Tensor | None
    """[B] rows of the new layout that are of no row of the old one: zeros. None: all are."""
    unused_A: Tensor | None

    def apply(self, x: Tensor) -> Tensor:
        """Return the rows [B, ...] of `x` [A, ...]."""
        moved: Tensor = _Moved.apply(x, self.rows_B, self.unused_B, self.rows_A, self.unused_A)
        return moved

    def back(self) -> Move:
        """Return the opposite move."""
        return Move(self.rows_A, self.rows_B, self.unused_A, self.unused_B)


class _Moved(torch.autograd.Function):
    """Takes rows forward and backward, so that the result is the same every time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor,
        unused: Tensor | None,
        back_rows: Tensor,
        back_unused: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(back_rows, back_unused)
        return _taken(x, rows, unused)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _taken(grad, *ctx.saved_tensors), None, None, None, None


def _taken(x: Tensor, rows: Tensor, unused: Tensor | None) -> Tensor:
    taken = x.index_select(0, rows)
    if unused is None:
        return taken
    return taken.masked_fill_(unused.view(-1, *[1] * (x.ndim - 1)), 0)
