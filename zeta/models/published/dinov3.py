"""DINOv3ViTModel of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zeta.models.published.options import Options
from zeta.models.published.tensors import Renaming
from zeta.stored_tensors import StoredTensor

DEFAULTS: dict[str, Any] = {
    "patch_size": 16, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12,
    "num_attention_heads": 6, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rope_theta": 100.0,
    "image_size": 224, "num_channels": 3, "query_bias": True, "key_bias": False,
    "value_bias": True, "proj_bias": True, "mlp_bias": True, "use_gated_mlp": False,
    "num_register_tokens": 0,
}  # fmt: skip
"""Options of DINOv3ViTConfig that change what an image becomes, with its defaults."""


def dinov3(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, Any], Renaming]:
    """Return the arguments of the NaViT and its weights.

    Raises:
        ValueError: something that NaViT does not have, by name.
    """
    options, renaming = Options(config, DEFAULTS, "DINOv3ViTModel"), Renaming(tensors)
    gated, patch = bool(options["use_gated_mlp"]), options.whole("patch_size")
    scale = config.get("layerscale_value")
    arguments = options.sizes() | {
        "image_size": [side // patch * patch for side in options.sides("image_size")],
        "mlp_dim": options.whole("intermediate_size"),
        "position": "rope",
        "rope_base": float(options["rope_theta"]),
        "rope_shift": config.get("pos_embed_shift"),
        "rope_jitter": config.get("pos_embed_jitter"),
        "rope_rescale": config.get("pos_embed_rescale", 2.0),
        "pool": "cls",
        "registers": options["num_register_tokens"],
        "layer_scale": 1.0 if scale is None else float(scale),
        "gated_mlp": gated,
    }
    renaming.made["embeds.cls_token"] = renaming.take("embeddings.cls_token")
    if arguments["registers"]:
        renaming.made["embeds.reg_token"] = renaming.take("embeddings.register_tokens")
    else:
        renaming.leave("embeddings.register_tokens", "there are none")
    renaming.patches("embeddings.patch_embeddings")
    renaming.leave("embeddings.mask_token", "it stands for masked patches in pretraining")
    inner = "model." if renaming.has("model.layer.0.norm1.weight") else ""
    for i in range(arguments["depth"]):
        ours, theirs = f"blocks.{i}", f"{inner}layer.{i}"
        parts = (f"{theirs}.attention.{part}_proj" for part in "qkv")
        arguments["qkv_bias"] = renaming.qkv(f"{ours}.attn", *parts)
        renaming.move(f"{ours}.attn.proj", f"{theirs}.attention.o_proj", bias=True)
        for number in (1, 2):
            renaming.move(f"{ours}.norm{number}", f"{theirs}.norm{number}")
            scale = renaming.take(f"{theirs}.layer_scale{number}.lambda1")
            renaming.made[f"{ours}.ls{number}.gamma"] = scale
        if gated:
            renaming.stack(
                f"{ours}.mlp.fc1", (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj"), bias=True
            )
        else:
            renaming.move(f"{ours}.mlp.fc1", f"{theirs}.mlp.up_proj", bias=True)
        renaming.move(f"{ours}.mlp.fc2", f"{theirs}.mlp.down_proj", bias=True)
    renaming.move("norm", "norm")
    return arguments, renaming
