"""Muon for the matrices of transformer blocks, AdamW for all other parameters, as one optimizer.

Muon (K. Jordan 2024, kellerjordan.github.io/posts/muon) moves a matrix along its momentum with all
singular values made nearly equal, by a few Newton-Schulz iterations. `torch.optim.Muon` does that
for one matrix a parameter. Here a weight that stacks several, as q, k and v, is taken matrix by
matrix: the author found that better than one matrix of q, k and v, and the update of a matrix then
does not depend on whether a model stores it alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

ROWS = "rows"
"""Key of the parameter groups of matrices: for each parameter, the rows of its matrices."""


class Muon(torch.optim.Optimizer):
    """Torch's Muon on the groups of matrices, and torch's AdamW on the others.

    Its state is by parameter and of its shape: `momentum_buffer` of a matrix, `exp_avg` and
    `exp_avg_sq` of any other parameter.
    """

    whole_matrices: ClassVar[bool] = True
    """Whether it needs the matrices whole: ZeRO 1 to 3 lay parts of them end to end."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
    ) -> None:
        """Share the parameters out.

        Args:
            groups: parameter groups, each with a `weight_decay` of its own; those with `rows`, a
                list of row counts for each parameter, are of matrices [sum of rows, columns].
            lr: learning rate of both. With `match_rms_adamw` an update of Muon has the size that
                AdamW's have, so that a rate and a decay found for AdamW fit.
            betas: decay rates of AdamW's moments.
            momentum: decay rate of Muon's momentum.
            nesterov: see torch.optim.Muon, as for the arguments below.
            ns_coefficients: three, of the iteration's polynomial.
            eps: least norm that a matrix is divided by.
            ns_steps: iterations.
            adjust_lr_fn: match_rms_adamw, original or spectral_unclamped.

        Raises:
            ValueError: this torch has no Muon, or refuses an argument, or there is no matrix.
        """
        check_torch_has_muon()
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        matrices, others = self._shared_out()
        parts = [part for group in matrices for stack in _stacks(group) for part in stack]
        self._muon = torch.optim.Muon(
            parts,
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=(*ns_coefficients,),  # type: ignore[arg-type] # torch counts them
            eps=eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )
        self._release()
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, fused=True) if others else None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override] # as torch's own
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices, others = self._shared_out()
        self._muon.param_groups = [
            {**self._muon.defaults, **group, "params": self._bound_parts(group)}
            for group in matrices
        ]
        self._muon.step()
        self._release()
        if self._adamw is not None:
            self._adamw.state, self._adamw.param_groups = self.state, others
            self._adamw.step()
        return loss

    def _release(self) -> None:
        """Forget the views of a step, which would keep its gradients in memory during the next."""
        self._muon.param_groups, self._muon.state = [], defaultdict(dict)

    def _shared_out(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the groups of matrices, and the others."""
        matrices = [group for group in self.param_groups if ROWS in group]
        return matrices, [group for group in self.param_groups if ROWS not in group]

    def _bound_parts(self, group: dict[str, Any]) -> list[Tensor]:
        """Return the matrices of a group as views, with views as gradients and as momentum."""
        bound = []
        for weight, rows, parts in zip(group["params"], group[ROWS], _stacks(group), strict=True):
            if weight.grad is None:
                continue
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            momentum = state["momentum_buffer"].split(rows)
            for part, gradient, buffer in zip(
                parts, weight.grad.split(rows), momentum, strict=True
            ):
                part.grad = gradient
                self._muon.state[part]["momentum_buffer"] = buffer
                bound.append(part)
        return bound


def check_torch_has_muon() -> None:
    """Raise ValueError unless the installed torch has Muon."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"optim.kind is muon, but torch {torch.__version__} has no torch.optim.Muon: install "
            "torch 2.10 or newer, or set optim.kind=adamw"
        )


def _stacks(group: dict[str, Any]) -> list[tuple[Tensor, ...]]:
    """Return the matrices of each parameter of a group, as views."""
    pairs = zip(group["params"], group[ROWS], strict=True)
    return [weight.detach().split(rows) for weight, rows in pairs]
