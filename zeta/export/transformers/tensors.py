"""The weights of a NaViT or MegaVit under the names of transformers' classes.

Biases that the class insists on are zeros where our model has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zeta.export.transformers.classes import DINOV3, SIGLIP2_CLASSIFIER, Target
from zeta.stored_tensors import StoredTensor, halves, ones, rows_of, stacked, zeros

Tensors = Mapping[str, StoredTensor]


def tensors_for(
    target: Target, own: Tensors, arguments: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Return the weights by the names of the class.

    Args:
        target: the class; the model fits it.
        own: weights by our names.
        arguments: arch and constructor arguments, defaults included.
    """
    if target is DINOV3:
        return _dinov3(own, arguments)
    if target is SIGLIP2_CLASSIFIER:
        tower = {f"vision_model.{name}": t for name, t in _siglip2(own, arguments).items()}
        head = own["head.weight"], own["head.bias"]
        return tower | {"classifier.weight": head[0], "classifier.bias": head[1]}
    return _siglip2(own, arguments) | _attention_pool(own)


def _dinov3(own: Tensors, arguments: Mapping[str, Any]) -> dict[str, StoredTensor]:
    dim, patch, channels = arguments["dim"], arguments["patch_size"], arguments["channels"]
    kernel = own["embeds.proj.weight"]

    def as_convolution(weight: Tensor) -> Tensor:
        return weight.view(dim, patch, patch, channels).permute(0, 3, 1, 2)

    made = {
        "embeddings.cls_token": own["embeds.cls_token"],
        "embeddings.mask_token": zeros((1, 1, dim), kernel.dtype),
        "embeddings.register_tokens": own.get("embeds.reg_token", zeros((1, 0, dim), kernel.dtype)),
        "embeddings.patch_embeddings.weight": kernel.changed(
            as_convolution, (dim, channels, patch, patch)
        ),
        "embeddings.patch_embeddings.bias": _bias(own, "embeds.proj"),
        **_layer(own, "norm", "norm"),
    }
    for i in range(arguments["depth"]):
        ours, theirs = f"blocks.{i}", f"layer.{i}"
        for number in (1, 2):
            made |= _layer(own, f"{ours}.norm{number}", f"{theirs}.norm{number}")
            scale = own.get(f"{ours}.ls{number}.gamma", ones((dim,), torch.float32))
            made[f"{theirs}.layer_scale{number}.lambda1"] = scale
        made |= _qkv(own, f"{ours}.attn", f"{theirs}.attention", every_bias=False)
        made |= _layer(own, f"{ours}.attn.proj", f"{theirs}.attention.o_proj")
        first = _layer(own, f"{ours}.mlp.fc1", "up")
        for kind, tensor in (("weight", first["up.weight"]), ("bias", first["up.bias"])):
            if arguments.get("gated_mlp"):
                gate, tensor = halves(tensor)
                made[f"{theirs}.mlp.gate_proj.{kind}"] = gate
            made[f"{theirs}.mlp.up_proj.{kind}"] = tensor
        made |= _layer(own, f"{ours}.mlp.fc2", f"{theirs}.mlp.down_proj")
    return made


def _siglip2(own: Tensors, arguments: Mapping[str, Any]) -> dict[str, StoredTensor]:
    table = own["embeds.pos_embed"]
    rows = (table.shape[1] * table.shape[2], table.shape[3])
    made = {
        "embeddings.position_embedding.weight": table.changed(lambda t: t.reshape(rows), rows),
        **_layer(own, "embeds.proj", "embeddings.patch_embedding"),
        **_layer(own, "norm", "post_layernorm"),
    }
    for i in range(arguments["depth"]):
        ours, theirs = f"blocks.{i}", f"encoder.layers.{i}"
        made |= _qkv(own, f"{ours}.attn", f"{theirs}.self_attn", every_bias=True)
        made |= _layer(own, f"{ours}.attn.proj", f"{theirs}.self_attn.out_proj")
        for number in (1, 2):
            made |= _layer(own, f"{ours}.norm{number}", f"{theirs}.layer_norm{number}")
            made |= _layer(own, f"{ours}.mlp.fc{number}", f"{theirs}.mlp.fc{number}")
    return made


def _attention_pool(own: Tensors) -> dict[str, StoredTensor]:
    pool = "attn_pool"
    made = {"head.probe": own[f"{pool}.latent"]}
    query, key_value = _layer(own, f"{pool}.q", "q"), _layer(own, f"{pool}.kv", "kv")
    for kind in ("weight", "bias"):
        parts = (query[f"q.{kind}"], key_value[f"kv.{kind}"])
        made[f"head.attention.in_proj_{kind}"] = stacked(parts)
    made |= _layer(own, f"{pool}.proj", "head.attention.out_proj")
    made |= _layer(own, f"{pool}.norm", "head.layernorm")
    for layer in ("fc1", "fc2"):
        made |= _layer(own, f"{pool}.mlp.{layer}", f"head.mlp.{layer}")
    return made


def _qkv(own: Tensors, ours: str, theirs: str, *, every_bias: bool) -> dict[str, StoredTensor]:
    """Return queries, keys and values; with `every_bias`, zeros for the biases that are missing."""
    weight = own[f"{ours}.qkv.weight"]
    width = weight.shape[0] // 3
    made: dict[str, StoredTensor] = {}
    for number, part in enumerate("qkv"):
        rows = (number * width, (number + 1) * width)
        made[f"{theirs}.{part}_proj.weight"] = rows_of(weight, *rows)
        bias = own.get(f"{ours}.{part}_bias")
        if f"{ours}.qkv.bias" in own:
            bias = rows_of(own[f"{ours}.qkv.bias"], *rows)
        elif bias is None and every_bias:
            bias = zeros((width,), weight.dtype)
        if bias is not None:
            made[f"{theirs}.{part}_proj.bias"] = bias
    return made


def _layer(own: Tensors, ours: str, theirs: str) -> dict[str, StoredTensor]:
    return {f"{theirs}.weight": own[f"{ours}.weight"], f"{theirs}.bias": _bias(own, ours)}


def _bias(own: Tensors, ours: str) -> StoredTensor:
    weight = own[f"{ours}.weight"]
    return own.get(f"{ours}.bias", zeros(weight.shape[:1], weight.dtype))
