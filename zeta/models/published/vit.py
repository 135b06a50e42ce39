"""ViTModel, Dinov2Model and Dinov2WithRegistersModel of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zeta.models.published.classes import CLASSIFIER, class_of
from zeta.models.published.options import Options
from zeta.models.published.tensors import Renaming, grid_table, token_with_position
from zeta.stored_tensors import StoredTensor

Arguments = dict[str, Any]
_SIZES = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "gelu",
    "image_size": 224, "patch_size": 16, "num_channels": 3, "qkv_bias": True,
}  # fmt: skip
_VIT = _SIZES | {
    "intermediate_size": 3072, "layer_norm_eps": 1e-12, "pooler_act": "tanh",
    "pooler_output_size": None,
}  # fmt: skip
_DINOV2 = _SIZES | {
    "patch_size": 14, "mlp_ratio": 4, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False,
}  # fmt: skip
_REGISTERS = _DINOV2 | {"patch_size": 16, "num_register_tokens": 4}


def vit(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[Arguments, Renaming]:
    """Return the arguments of the NaViT and its weights, of a ViTModel or its classifier.

    Raises:
        ValueError: something that NaViT does not have, by name.
    """
    inside = any(name.startswith("vit.") for name in tensors)
    classifier = CLASSIFIER in tensors
    if inside and not classifier:
        raise ValueError(
            f"its class is {class_of(config, 'vit')}, whose head is no classifier, and which zeta "
            "does not take: save the encoder alone (ViTModel)"
        )
    options = Options(config, _VIT, "ViTModel")
    renaming = Renaming(tensors, "vit." if inside else "")
    arguments = options.sizes() | {
        "mlp_dim": options.whole("intermediate_size"),
        "position": "grid_bicubic_plain",
        "pool": "cls",
        "pooler": renaming.has("pooler.dense.weight"),
    }
    _embeddings(options, arguments, renaming)
    for ours, theirs in _blocks(arguments):
        _attention(arguments, renaming, ours, theirs)
        renaming.move(f"{ours}.norm1", f"{theirs}.layernorm_before")
        renaming.move(f"{ours}.norm2", f"{theirs}.layernorm_after")
        renaming.move(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense")
        renaming.move(f"{ours}.mlp.fc2", f"{theirs}.output.dense")
    renaming.move("norm", "layernorm")
    if arguments["pooler"]:
        options.refuse_unless("pooler_act", "tanh")
        options.refuse_unless("pooler_output_size", None, arguments["dim"])
        renaming.move("pooler", "pooler.dense")
    if classifier:
        renaming.outer("head", "classifier")
    return arguments, renaming


def dinov2(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[Arguments, Renaming]:
    """Return the arguments of the NaViT and its weights, of a Dinov2Model, registers or not.

    Raises:
        ValueError: something that NaViT does not have, by name.
    """
    registers = config["model_type"] == "dinov2_with_registers"
    what = "Dinov2WithRegistersModel" if registers else "Dinov2Model"
    if any(name.startswith("classifier.") for name in tensors):
        raise ValueError(
            "its classifier reads the class token and the mean of the patches side by side, which "
            f"NaViT does not: save the encoder alone ({what})"
        )
    options = Options(config, _REGISTERS if registers else _DINOV2, what)
    renaming = Renaming(tensors)
    hidden = int(options.whole("hidden_size") * options["mlp_ratio"])
    gated = bool(options["use_swiglu_ffn"])
    arguments = options.sizes() | {
        "mlp_dim": (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden,
        "position": "grid_bicubic" if registers else "grid_bicubic_plain",
        "pool": "cls",
        "registers": options["num_register_tokens"] if registers else 0,
        "layer_scale": float(config.get("layerscale_value", 1.0)),
    }
    if gated:
        arguments |= {"gated_mlp": True, "activation": "silu"}
    _embeddings(options, arguments, renaming)
    if arguments["registers"]:
        renaming.made["embeds.reg_token"] = renaming.take("embeddings.register_tokens")
    else:
        renaming.leave_own("embeddings.register_tokens", "there are none")
    for ours, theirs in _blocks(arguments):
        _attention(arguments, renaming, ours, theirs)
        for number in (1, 2):
            renaming.move(f"{ours}.norm{number}", f"{theirs}.norm{number}")
            scale = renaming.take(f"{theirs}.layer_scale{number}.lambda1")
            renaming.made[f"{ours}.ls{number}.gamma"] = scale
        first, second = ("weights_in", "weights_out") if gated else ("fc1", "fc2")
        renaming.move(f"{ours}.mlp.fc1", f"{theirs}.mlp.{first}")
        renaming.move(f"{ours}.mlp.fc2", f"{theirs}.mlp.{second}")
    renaming.move("norm", "layernorm")
    return arguments, renaming


def _blocks(arguments: Arguments) -> list[tuple[str, str]]:
    return [(f"blocks.{i}", f"encoder.layer.{i}") for i in range(arguments["depth"])]


def _attention(arguments: Arguments, renaming: Renaming, ours: str, theirs: str) -> None:
    names = (f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value"))
    arguments["qkv_bias"] = renaming.qkv(f"{ours}.attn", *names)
    renaming.move(f"{ours}.attn.proj", f"{theirs}.attention.output.dense", bias=True)


def _embeddings(options: Options, arguments: Arguments, renaming: Renaming) -> None:
    height, width = options.sides("image_size")
    patch = arguments["patch_size"]
    arguments["image_size"] = [height // patch * patch, width // patch * patch]
    table = renaming.take("embeddings.position_embeddings")
    token = renaming.take("embeddings.cls_token")
    renaming.made["embeds.cls_token"] = token_with_position(token, table, 0)
    grid = (height // patch, width // patch)
    renaming.made["embeds.pos_embed"] = grid_table(table, grid, prefix=1)
    renaming.patches("embeddings.patch_embeddings.projection")
    renaming.leave_own("embeddings.mask_token", "it stands for masked patches in pretraining")
