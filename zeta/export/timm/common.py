"""What the models of timm have in common, in timm's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from zeta.stored_tensors import StoredTensor, zeros

_TINY = 1e-6


def mlp_ratio(arguments: Mapping[str, Any]) -> float:
    """Return the ratio from which timm gets `mlp_dim`.

    timm rounds dim * ratio down; the half keeps float error from losing a channel.
    """
    return float((arguments["mlp_dim"] + 0.5) / arguments["dim"])


def init_values(arguments: Mapping[str, Any]) -> float | None:
    """Return timm's initial layer scale. 0 would be none to timm, and the weights are loaded."""
    initial: float | None = arguments.get("layer_scale")
    return _TINY if initial == 0 else initial


def with_zero_biases(
    tensors: Mapping[str, StoredTensor], wants_bias: Callable[[str], bool]
) -> dict[str, StoredTensor]:
    """Return `tensors` with a bias of zeros after each weight that timm gives one and we do not.

    Args:
        tensors: by timm's names.
        wants_bias: whether a module of this name has a bias in timm.
    """
    made: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        made[name] = tensor
        module = name.removesuffix(".weight")
        if module != name and wants_bias(module) and f"{module}.bias" not in tensors:
            made[f"{module}.bias"] = zeros(tensor.shape[:1], tensor.dtype)
    return made
