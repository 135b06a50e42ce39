"""The options that both of timm's models share, and the biases that timm insists on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from zeta.models.config import model_from_arguments
from zeta.models.parameters import parameter_rules
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
    # To timm, 0 means no layer scale; None would too, but transformers drops it on the way to timm,
    # whose entry point then adds one. Weights are loaded: any other initial value will do.
    layer_scale = arguments["layer_scale"]
    init_values = 0.0 if layer_scale is None else float(layer_scale or _TINY)
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
    return {
        "global_pool": _POOLS[arguments["pool"]],
        "fc_norm": arguments.get("norm_after_pool", False),
    }


def rate_args(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dropout rates of a model under timm's names; `arguments` as `size_args`."""
    return {
        "drop_path_rate": arguments["stochastic_depth"],
        "proj_drop_rate": arguments["dropout"],
        "pos_drop_rate": arguments["emb_dropout"],
    }


def with_zero_biases(
    own: Mapping[str, StoredTensor], model_arguments: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Return `own` with a bias of zeros after each weight that has one only in timm.

    Args:
        own: weights by our names.
        model_arguments: arch and constructor arguments of the model.
    """
    with torch.device("meta"):
        rules = parameter_rules(model_from_arguments(model_arguments))
    made: dict[str, StoredTensor] = {}
    for name, tensor in own.items():
        made[name] = tensor
        bias = f"{name.removesuffix('.weight')}.bias"
        if name in rules and rules[name].bias_in_timm and bias not in own:
            made[bias] = zeros(tensor.shape[:1], tensor.dtype)
    return made
