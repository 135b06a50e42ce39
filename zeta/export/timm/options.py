"""The options that both of timm's models share, and the biases that timm insists on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from zeta.stored_tensors import StoredTensor, zeros

_TINY = 1e-6
_POOLS = {"attention": "map", "mean": "avg", "cls": "token"}
"""Our pooling -> timm's `global_pool`; all leave registers out."""


def size_args(arguments: Mapping[str, Any], *, qkv_bias: bool, proj_bias: bool) -> dict[str, Any]:
    """Return the sizes and parts of a model under timm's names.

    Args:
        arguments: constructor arguments of one of our models, defaults included.
        qkv_bias: whether queries, keys and values have a bias.
        proj_bias: whether the projections after attention and in the MLPs have one.
    """
    # timm rounds dim * ratio down; the half keeps float error from losing a channel.
    mlp_ratio = float((arguments["mlp_dim"] + 0.5) / arguments["dim"])
    # To timm, 0 means no layer scale. The weights are loaded, so any other initial value will do.
    init_values = _TINY if arguments["layer_scale"] == 0 else arguments["layer_scale"]
    return {
        "in_chans": arguments["channels"],
        "patch_size": arguments["patch_size"],
        "embed_dim": arguments["dim"],
        "depth": arguments["depth"],
        "num_heads": arguments["heads"],
        "mlp_ratio": mlp_ratio,
        "qkv_bias": qkv_bias,
        "proj_bias": proj_bias,
        "qk_norm": arguments["qk_norm"],
        "init_values": init_values,
        "class_token": arguments["pool"] == "cls",
    }


def pool_args(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pooling of a model under timm's names; `arguments` as `size_args`."""
    return {"global_pool": _POOLS[arguments["pool"]], "fc_norm": False}


def rate_args(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dropout rates of a model under timm's names; `arguments` as `size_args`."""
    return {
        "drop_path_rate": arguments["stochastic_depth"],
        "proj_drop_rate": arguments["dropout"],
        "pos_drop_rate": arguments["emb_dropout"],
    }


def with_zero_biases(
    tensors: Mapping[str, StoredTensor], wants_bias: Callable[[str], bool]
) -> dict[str, StoredTensor]:
    """Return `tensors` with a bias of zeros after each weight that has one only in timm.

    Args:
        tensors: weights by timm's names.
        wants_bias: whether a module of this name has a bias in timm.
    """
    made: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        made[name] = tensor
        module = name.removesuffix(".weight")
        if module != name and wants_bias(module) and f"{module}.bias" not in tensors:
            made[f"{module}.bias"] = zeros(tensor.shape[:1], tensor.dtype)
    return made
