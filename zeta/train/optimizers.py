"""The optimizers by name: `optim.kind` is a key of `OPTIMIZERS`, `optim.params` its arguments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch

from zeta.config_field import check_choice

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
    )
}
"""Builders by `optim.kind`. An optimizer that you add must keep separate state for every weight, in
tensors of the parameter's shape, so that checkpoints fit any number of ranks and any stage.
(torch's Adagrad fails in DeepSpeed 0.19.8 at ZeRO-2.)"""

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
    decided = _DECIDED | ({"betas": "optim.betas"} if kind == "adamw" else {})
    taken = _arguments(OPTIMIZERS[kind], decided)
    for name in params:
        if name in decided:
            raise ValueError(f"optim.params.{name} is decided by {decided[name]}: leave it out")
        if taken is not None and name not in taken:
            raise ValueError(
                f"optim.params.{name}: the optimizer {kind} does not take it; choose from "
                f"{', '.join(taken)}"
            )


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
