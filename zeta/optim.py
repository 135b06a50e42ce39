"""AdamW with weight-decay groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    """Split the trainable parameters of `module` by weight decay; empty groups are left out."""
    head = config.head_weight_decay
    body = config.weight_decay
    rates = {"body": body, "head": body if head is None else head, "none": 0.0}
    of_group: dict[str, list[nn.Parameter]] = {group: [] for group in GROUPS}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            of_group[decay_group(name, full_shape(parameter))].append(parameter)
    return [
        {"params": members, "weight_decay": rates[group]}
        for group, members in of_group.items()
        if members
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
    """Return name and full shape of every trainable parameter, in the order of the module."""
    return {name: full_shape(p) for name, p in module.named_parameters() if p.requires_grad}
