"""The order of optimizer state in checkpoints that do not name it, by the rule of their time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_UNDECAYED = ("pos_embed", "token_embed", "latent", "cls_token", "reg_token", "register")


def unnamed_order(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the names of parameters as the optimizer of an old checkpoint numbers them.

    Body, head, then what never decays. NOTE: this rule is fixed: it reads files that exist. What
    decays today stands in `zeta.models.parameters`.

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
