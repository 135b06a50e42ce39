"""MegaVit as timm's VisionTransformer.

The parallel block is timm's `ParallelScalingBlock`. A config.json cannot name a block, but one of
timm's entry points has it, and takes all other options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from zeta.export.timm.options import pool_args, rate_args, size_args
from zeta.stored_tensors import StoredTensor

FIXED_SIZE = True
FIRST_LAYER = "patch_embed.proj"

_UNUSED: dict[str, Any] = {
    "scale_attn_norm": False, "scale_mlp_norm": False, "pos_embed": "learn", "reg_tokens": 0,
    "pre_norm": False, "final_norm": True, "pool_include_prefix": False,
    "dynamic_img_size": False, "dynamic_img_pad": False, "drop_rate": 0.0,
    "patch_drop_rate": 0.0, "attn_drop_rate": 0.0, "weight_init": "", "fix_init": False,
    "embed_norm_layer": None, "norm_layer": "layernorm", "act_layer": None, "attn_layer": "attn",
}  # fmt: skip
"""Arguments of timm's VisionTransformer that our models do not use. They are written all the same,
because the entry points have defaults of their own; none that differ are None, which
transformers drops on the way to timm."""


def entry_point(arguments: Mapping[str, Any]) -> str:
    """Return the entry point of timm that builds the blocks of this MegaVit."""
    return "vit_base_patch16_xp_224" if arguments["parallel"] else "vit_base_patch16_224"


def obstacle(arguments: Mapping[str, Any]) -> str | None:
    """Return which option of a MegaVit VisionTransformer does not support; None if all."""
    position = arguments["position"]
    if position != "table":
        return (
            f"model.position is {position}: timm's VisionTransformer has no rotary positions; "
            "train with model.position=table to export to timm, or a navit"
        )
    return None


def model_args(arguments: Mapping[str, Any], sides: Sequence[int]) -> dict[str, Any]:
    """Return all arguments of timm's VisionTransformer that a config.json can hold.

    Args:
        arguments: constructor arguments of the MegaVit, defaults included.
        sides: its `image_size`, [height, width] in pixels.
    """
    return _UNUSED | {
        "img_size": list(sides),
        **size_args(arguments, qkv_bias=False, proj_bias=arguments["parallel"]),
        **_layer_scale(arguments),
        "no_embed_class": True,
        **pool_args(arguments),
        **rate_args(arguments),
    }


def _layer_scale(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the initial layer scale of a parallel block, to which 0 is no word for none."""
    none = arguments["parallel"] and arguments["layer_scale"] is None
    return {"init_values": None} if none else {}


def tensors(
    own: Mapping[str, StoredTensor], arguments: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Return the weights of a MegaVit under timm's names, its patch embedding as a convolution."""
    patch, channels = arguments["patch_size"], arguments["channels"]

    def as_convolution(weight: Tensor) -> Tensor:
        return weight.view(-1, patch, patch, channels).permute(0, 3, 1, 2)

    made: dict[str, StoredTensor] = {}
    for name, tensor in own.items():
        if name == "embeds.proj.weight":
            shape = (tensor.shape[0], channels, patch, patch)
            made["patch_embed.proj.weight"] = tensor.changed(as_convolution, shape)
        elif name == "embeds.pos_embed":
            _, height, width, dim = tensor.shape
            made["pos_embed"] = tensor.changed(_flattened, (1, height * width, dim))
        else:
            made[name.replace("embeds.proj.", "patch_embed.proj.").removeprefix("embeds.")] = tensor
    return made


def _flattened(table: Tensor) -> Tensor:
    return table.flatten(1, 2)
