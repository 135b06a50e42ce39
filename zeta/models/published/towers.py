"""The vision towers of SigLIP, SigLIP 2 and CLIP in transformers, alone or beside a text tower."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from zeta.models.published.options import Options
from zeta.models.published.tensors import (
    Renaming,
    attention_pool,
    grid_table,
    token_with_position,
)
from zeta.stored_tensors import StoredTensor, zeros

_SIZES = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_channels": 3, "patch_size": 16,
}  # fmt: skip
_SIGLIP = _SIZES | {
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True,
    "image_size": 224,
}  # fmt: skip
SIGLIP2: dict[str, Any] = {k: v for k, v in _SIGLIP.items() if k != "image_size"} | {
    "num_patches": 256
}
"""Options of Siglip2VisionConfig that change what an image becomes, with its defaults."""
_CLIP = _SIZES | {
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "image_size": 224, "patch_size": 32,
}  # fmt: skip
_TEXT = "it belongs to the text, not to the image encoder"
_IDS = "they count positions and are no weights"


def siglip(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, Any], Renaming]:
    """Return the arguments of the NaViT and its weights, of a SigLIP or SigLIP 2 vision tower.

    Raises:
        ValueError: something that NaViT does not have, by name.
    """
    second = config["model_type"].startswith("siglip2")
    renaming, own = _tower(config, tensors)
    what = "Siglip2VisionModel" if second else "SiglipVisionModel"
    options = Options(own, SIGLIP2 if second else _SIGLIP, what)
    patch = options.whole("patch_size")
    if second:
        side = math.isqrt(options.whole("num_patches"))
        grid = (side, side)
    else:
        height, width = options.sides("image_size")
        grid = (height // patch, width // patch)
    classifier = "classifier.weight" in tensors
    has_pool = renaming.has("head.probe")
    arguments = options.sizes() | {
        "image_size": [side * patch for side in grid],
        "mlp_dim": options.whole("intermediate_size"),
        "position": "grid_bilinear" if second else "grid_bicubic_plain",
        "pool": "attention" if has_pool and not classifier else "mean",
    }
    table = renaming.take("embeddings.position_embedding.weight")
    renaming.made["embeds.pos_embed"] = grid_table(table, grid, prefix=0)
    renaming.patches("embeddings.patch_embedding")
    renaming.leave_own("embeddings.position_ids", _IDS)
    _blocks(arguments, renaming)
    renaming.move("norm", "post_layernorm")
    if arguments["pool"] == "attention":
        attention_pool(renaming, "head")
    elif classifier:
        renaming.leave_own("head.", "its class pools by the mean of the patches")
    if classifier:
        renaming.outer("head", "classifier")
    return arguments, renaming


def clip(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, Any], Renaming]:
    """Return the arguments of the NaViT and its weights, of a CLIP vision tower.

    A projection into the space of the captions becomes the head.

    Raises:
        ValueError: something that NaViT does not have, by name.
    """
    if "classifier.weight" in tensors:
        raise ValueError(
            "its classifier reads the mean of patches that no norm was applied to, which NaViT "
            "does not: save the encoder alone (CLIPVisionModel)"
        )
    renaming, own = _tower(config, tensors)
    options = Options(own, _CLIP, "CLIPVisionModel")
    patch = options.whole("patch_size")
    grid = tuple(side // patch for side in options.sides("image_size"))
    arguments = options.sizes() | {
        "image_size": [side * patch for side in grid],
        "mlp_dim": options.whole("intermediate_size"),
        "position": "grid_bicubic_plain",
        "pool": "cls",
        "pre_norm": True,
    }
    table = renaming.take("embeddings.position_embedding.weight")
    token = renaming.take("embeddings.class_embedding")
    renaming.made["embeds.cls_token"] = token_with_position(token, table, 0)
    renaming.made["embeds.pos_embed"] = grid_table(table, (grid[0], grid[1]), prefix=1)
    renaming.patches("embeddings.patch_embedding")
    renaming.leave_own("embeddings.position_ids", _IDS)
    renaming.move("embeds.norm_pre", "pre_layrnorm")  # as transformers spells it
    _blocks(arguments, renaming)
    renaming.move("norm", "post_layernorm")
    if "visual_projection.weight" in tensors:
        renaming.outer("head", "visual_projection")
        head = renaming.made["head.weight"]
        renaming.made["head.bias"] = zeros(head.shape[:1], head.dtype)
    return arguments, renaming


def _tower(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[Renaming, Mapping[str, Any]]:
    """Return the tensors of the vision tower, without those of the text, and its config."""
    beginning = "vision_model."
    inside = any(name.startswith(beginning) for name in tensors)
    renaming = Renaming(tensors, beginning if inside else "")
    for name in ("text_model.", "text_projection.", "logit_scale", "logit_bias"):
        renaming.leave(name, _TEXT)
    own = config.get("vision_config")
    if own is None and config["model_type"] in ("siglip", "siglip2", "clip"):
        own = {}
    return renaming, config if own is None else own


def _blocks(arguments: dict[str, Any], renaming: Renaming) -> None:
    for i in range(arguments["depth"]):
        ours, theirs = f"blocks.{i}", f"encoder.layers.{i}"
        parts = (f"{theirs}.self_attn.{part}_proj" for part in "qkv")
        arguments["qkv_bias"] = renaming.qkv(f"{ours}.attn", *parts)
        renaming.move(f"{ours}.attn.proj", f"{theirs}.self_attn.out_proj", bias=True)
        for number in (1, 2):
            renaming.move(f"{ours}.norm{number}", f"{theirs}.layer_norm{number}")
            renaming.move(f"{ours}.mlp.fc{number}", f"{theirs}.mlp.fc{number}")
