"""The optimizers by name: `optim.kind` is a key of `OPTIMIZERS`, `optim.params` its arguments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch

from zeta.config_field import check_choice
from zeta.train.optimizers.muon import Muon, check_torch_has_muon

OptimizerBuilder = Callable[..., torch.optim.Optimizer]
"""Function of parameter groups, `lr` and further arguments; returns the optimizer."""

OPTIMIZERS: dict[str, OptimizerBuilder] = {
    kind.__name__.lower(): kind
    for kind in (
        torch.optim.AdamW,
        torch.optim.Adam,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.SGD,
        Muon,
    )
}
"""Builders by `optim.kind`. An optimizer that you add must keep separate state for every weight, in
tensors of the parameter's shape, so that checkpoints fit any number of ranks and any stage. One
that needs whole matrices has `whole_matrices = True`, and is refused where ZeRO shards them.
(torch's Adagrad fails in DeepSpeed 0.19.8 at ZeRO-2.)"""

_WITH_BETAS = ("adamw", "muon")
"""Optimizers that take `optim.betas`."""
_DECIDED = {
    "lr": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.clip",
}


def check_optimizer_params(kind: str, params: Mapping[str, Any]) -> None:
    """Raise ValueError unless the optimizer `kind` exists and has arguments named as in `params`.

    Values are checked when the optimizer is built.
    """
    check_choice("optim.kind", kind, OPTIMIZERS)
    if kind == "muon":
        check_torch_has_muon()
    decided = _DECIDED | ({"betas": "optim.betas"} if takes_betas(kind) else {})
    taken = _arguments(OPTIMIZERS[kind], decided)
    for name in params:
        if name in decided:
            raise ValueError(f"optim.params.{name} is decided by {decided[name]}: leave it out")
        if taken is not None and name not in taken:
            raise ValueError(
                f"optim.params.{name}: the optimizer {kind} does not take it; choose from "
                f"{', '.join(taken)}"
            )


def takes_betas(kind: str) -> bool:
    """Return whether the optimizer `kind` takes `optim.betas`."""
    return kind in _WITH_BETAS


def highest_stage(kind: str) -> int:
    """Return the highest ZeRO stage at which the optimizer `kind` gives the results of stage 0.

    It is 0 for one that needs whole matrices: the other stages hand it parts of the weights, laid
    end to end. DeepSpeed 0.19.8 has a Muon for them, which updates the momentum and orthogonalizes
    before the norm of the gradients is known: clipping would then scale the updates, and a step
    that is not finite would leave its mark in the momentum.
    """
    return 0 if needs_whole_matrices(kind) else 3


def needs_whole_matrices(kind: str) -> bool:
    """Return whether the optimizer `kind` treats the weights of a matrix together."""
    return bool(getattr(OPTIMIZERS[kind], "whole_matrices", False))


def optimizer_name(kind: str) -> str:
    """Return the optimizer's name in checkpoints: that of its class, such as AdamW."""
    builder = OPTIMIZERS[kind]
    named = builder.func if isinstance(builder, partial) else builder
    return str(getattr(named, "__name__", kind))


def _arguments(builder: OptimizerBuilder, decided: Collection[str]) -> list[str] | None:
    """Return the names of an optimizer's further arguments; None: any names."""
    _, *parameters = signature(builder).parameters.values()
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters if parameter.name not in decided]
