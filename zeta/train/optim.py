"""Build the optimizer of a run, with weight-decay groups and lower rates in earlier layers."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from zeta.models.parameters import GROUPS, layers_above, parameter_rules
from zeta.train.config import OptimConfig
from zeta.train.optimizers import OPTIMIZERS


def layer_scales(names: Iterable[str], decay: float) -> dict[str, float]:
    """Return the factor on the learning rate of each parameter (Clark et al. 2020, "ELECTRA").

    The last norm, pooling and head learn at the full rate, and each layer before at `decay` times
    the rate of the next, see `zeta.models.parameters.layers_above`.

    Args:
        names: of all parameters of the model.
        decay: 1 is one rate for all.
    """
    return {name: decay**layers for name, layers in layers_above(names).items()}


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Split the trainable parameters of `module` by weight decay, and each part by layer.

    Empty groups are left out. A group's `lr_scale` is its factor on the learning rate. The order of
    the parameters does not depend on `config`.
    """
    head = config.head_weight_decay
    body = config.weight_decay
    rates = {"body": body, "head": body if head is None else head, "none": 0.0}
    parameters = dict(module.named_parameters())
    rules = parameter_rules(module)
    scales = layer_scales(parameters, config.layer_decay)
    of_group: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            of_group[rules[name].group].append(name)
    return [
        {
            "params": [parameters[name] for name in names],
            "weight_decay": rates[group],
            "lr_scale": scale,
        }
        for group, members in of_group.items()
        for scale, names in groupby(members, key=scales.__getitem__)
    ]


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer `config.kind` over `module`; its rates are set before every step.

    Raises:
        ValueError: `module` has nothing to train, or the optimizer refuses `config.params`.
    """
    groups = parameter_groups(module, config)
    if not groups:
        raise ValueError("the model has no trainable parameter")
    # fused: one pass over memory instead of one per operation of Adam's update.
    own = {"betas": config.betas, "fused": True} if config.kind == "adamw" else {}
    try:
        return OPTIMIZERS[config.kind](groups, lr=config.lr, **own | config.params)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"optim.params is {config.params}, which the optimizer {config.kind} refuses: {error}"
        ) from error


def check_optimizer(config: OptimConfig) -> None:
    """Raise ValueError, naming the arguments, unless the optimizer can be built with them."""
    with torch.random.fork_rng([]):
        build_optimizer(nn.Linear(1, 1), config)


def state_per_weight(config: OptimConfig) -> int:
    """Return the number of values that the optimizer keeps for each weight: two in AdamW."""
    with torch.random.fork_rng([]):
        module = nn.Linear(32, 32, bias=False)
    module.weight.grad = torch.ones_like(module.weight)
    optimizer = build_optimizer(module, config)
    optimizer.step()
    values = (v for v in optimizer.state[module.weight].values() if isinstance(v, Tensor))
    return sum(v.numel() == module.weight.numel() for v in values)
