"""AdamW with weight-decay groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zeta.train_config import OptimConfig

_TABLES = ("pos_embed", "latent", "cls_token", "reg_token", "register")


def is_decayed(name: str, shape: Sequence[int]) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases, tables and tokens.

    Args:
        name: dotted name in the model, in timm's words (`blocks.0.norm1.weight`).
        shape: full shape, which decides where the name does not.
    """
    parts = name.split(".")
    if any("norm" in part for part in parts) or any(parts[-1].startswith(t) for t in _TABLES):
        return False
    return len(shape) >= 2


def full_shape(parameter: nn.Parameter) -> list[int]:
    """Return the shape of a parameter, also where ZeRO-3 left only a shard of it."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters of `module` into a decayed and an undecayed group."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if is_decayed(n, full_shape(p))]
    undecayed = [p for n, p in named if not is_decayed(n, full_shape(p))]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW over `module`; the trainer sets the learning rate before every step.

    Raises:
        ValueError: `module` has nothing to train.
    """
    groups = parameter_groups(module, config.weight_decay)
    if not groups:
        raise ValueError("the model has no trainable parameter")
    # fused: one pass over memory instead of one per operation of Adam's update.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def parameter_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Return name and full shape of every trainable parameter, in the order of the module."""
    return {name: full_shape(p) for name, p in module.named_parameters() if p.requires_grad}
