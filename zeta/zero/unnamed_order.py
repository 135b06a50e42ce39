"""Reconstruct the order of optimizer state in old checkpoints that do not record it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_UNDECAYED = ("pos_embed", "token_embed", "latent", "cls_token", "reg_token", "register")


def unnamed_order(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the names of parameters as the optimizer of an old checkpoint numbers them.

    The order is body, head, then the parameters without weight decay. NOTE: never change this rule,
    which describes existing files; today's rule for weight decay is in `zeta.models.parameters`.

    Args:
        shapes: full shape of every trainable parameter, in the order of the module.
    """
    places = {name: _place(name, shape) for name, shape in shapes.items()}
    return sorted(shapes, key=places.__getitem__)


def _place(name: str, shape: Sequence[int]) -> int:
    parts = name.split(".")
    undecayed = any("norm" in part for part in parts) or parts[-1].startswith(_UNDECAYED)
    if undecayed or len(shape) < 2:
        return 2
    return 1 if parts[0] == "head" else 0
