"""Names, full shapes and weight-decay groups of the parameters of a model, sharded or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

GROUPS = ("body", "head", "none")
"""The weight-decay groups, in the order in which the optimizer has them."""


_TABLES = ("pos_embed", "token_embed", "latent", "cls_token", "reg_token", "register")


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


def parameter_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Return name and full shape of every parameter, frozen or not, in the order of the module."""
    return {name: full_shape(p) for name, p in module.named_parameters()}
