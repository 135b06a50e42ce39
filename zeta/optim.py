"""AdamW with weight-decay groups, and learning rates that fall towards the first layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from zeta.train_config import OptimConfig

_TABLES = ("pos_embed", "token_embed", "latent", "cls_token", "reg_token", "register")


GROUPS = ("body", "head", "none")
"""The weight-decay groups, in the order in which the optimizer has them."""


def decay_group(name: str, shape: Sequence[int]) -> str:
    """Return the weight-decay group of a parameter.

    Matrices decay, those of the head at a rate of their own (Zhai et al. 2022, section 3.1); norms,
    biases, position tables, learned tokens and the pooling query do not.

    Args:
        name: dotted name in the model, in timm's words (`blocks.0.norm1.weight`).
        shape: full shape, which decides where the name does not.
    """
    parts = name.split(".")
    if any("norm" in part for part in parts) or any(parts[-1].startswith(t) for t in _TABLES):
        return "none"
    if len(shape) < 2:
        return "none"
    return "head" if parts[0] == "head" else "body"


_BLOCK = re.compile(r"(?:(.*)\.)?blocks\.(\d+)\.")
"""Tower and number of the block that a parameter is in."""


def layer_scales(names: Iterable[str], decay: float) -> dict[str, float]:
    """Return the factor on the learning rate of each parameter (Clark et al. 2020, "ELECTRA").

    The last norm, pooling and head learn at the full rate, the last block at `decay` times it, each
    block before at `decay` times that of the next, and the patch embedding as one block more.

    Args:
        names: of all parameters of the model.
        decay: 1 is one rate for all.
    """
    names = list(names)
    blocks = {match.groups() for name in names if (match := _BLOCK.match(name))}
    depth = Counter(tower for tower, _ in blocks)
    scales = {}
    for name in names:
        layers_above = 0
        if match := _BLOCK.match(name):
            layers_above = depth[match[1]] - int(match[2])
        elif "embeds" in (parts := name.split(".")):
            tower = ".".join(parts[: parts.index("embeds")]) or None
            layers_above = depth[tower] + 1
        scales[name] = decay**layers_above
    return scales


def optimizer_order(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the names of parameters as the optimizer numbers them: group by group.

    Args:
        shapes: full shape of every trainable parameter, in the order of the module.
    """
    groups = {name: decay_group(name, shape) for name, shape in shapes.items()}
    return [name for group in GROUPS for name in shapes if groups[name] == group]


def full_shape(parameter: Tensor) -> list[int]:
    """Return the shape of a parameter, also where ZeRO-3 left only a shard of it."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Split the trainable parameters of `module` by weight decay, and each part by layer.

    Empty groups are left out. A group's `lr_scale` is its factor on the learning rate. The order of
    the parameters does not depend on `config` (see `optimizer_order`).
    """
    head = config.head_weight_decay
    body = config.weight_decay
    rates = {"body": body, "head": body if head is None else head, "none": 0.0}
    parameters = dict(module.named_parameters())
    scales = layer_scales(parameters, config.layer_decay)
    of_group: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            of_group[decay_group(name, full_shape(parameter))].append(name)
    return [
        {
            "params": [parameters[name] for name in names],
            "weight_decay": rates[group],
            "lr_scale": scale,
        }
        for group, members in of_group.items()
        for scale, names in groupby(members, key=scales.__getitem__)
    ]


def build_optimizer(
    module: nn.Module, config: OptimConfig, other: Mapping[str, Any] | None = None
) -> torch.optim.Optimizer:
    """Build AdamW over `module`; the trainer sets the learning rate before every step.

    Args:
        module: the model.
        config: AdamW's options; rate and weight decay are those of any optimizer.
        other: type (a class of torch.optim) and params of another optimizer instead.

    Raises:
        ValueError: `module` has nothing to train, or the other optimizer does not take its params.
    """
    groups = parameter_groups(module, config)
    if not groups:
        raise ValueError("the model has no trainable parameter")
    if other is not None:
        build: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, other["type"])
        try:
            return build(groups, lr=config.lr, **other.get("params", {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"train.deepspeed.optimizer.params: {error}") from error
    # fused: one pass over memory instead of one per operation of Adam's update.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def check_optimizer(config: OptimConfig, other: Mapping[str, Any] | None) -> None:
    """Raise ValueError, naming the params, unless the optimizer can be built with them."""
    with torch.random.fork_rng([]):
        build_optimizer(nn.Linear(1, 1), config, other)


def state_per_weight(other: Mapping[str, Any] | None) -> int:
    """Return how many values the optimizer keeps of each weight: two in AdamW.

    Args:
        other: as `build_optimizer` takes it.
    """
    with torch.random.fork_rng([]):
        module = nn.Linear(32, 32, bias=False)
    module.weight.grad = torch.ones_like(module.weight)
    optimizer = build_optimizer(module, OptimConfig(), other)
    optimizer.step()
    values = (v for v in optimizer.state[module.weight].values() if isinstance(v, Tensor))
    return sum(v.numel() == module.weight.numel() for v in values)


def parameter_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Return name and full shape of every parameter, frozen or not, in the order of the module."""
    return {name: full_shape(p) for name, p in module.named_parameters()}
