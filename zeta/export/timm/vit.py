"""MegaVit in the words of timm's VisionTransformer.

The parallel block is timm's `ParallelScalingBlock`. A config.json cannot name a block, but one of
timm's entry points brings it, and takes all other options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from zeta.export.timm.common import init_values, mlp_ratio, with_zero_biases
from zeta.stored_tensors import StoredTensor

_NORMS = ("norm1", "norm2", "in_norm", "q_norm", "k_norm", "norm")
_POOLS = {"cls": "token", "mean": "avg"}
"""Our pooling -> timm's `global_pool`."""
_UNUSED: dict[str, Any] = {
    "scale_attn_norm": False, "scale_mlp_norm": False, "pos_embed": "learn", "reg_tokens": 0,
    "pre_norm": False, "final_norm": True, "pool_include_prefix": False,
    "dynamic_img_size": False, "dynamic_img_pad": False, "drop_rate": 0.0,
    "patch_drop_rate": 0.0, "attn_drop_rate": 0.0, "weight_init": "", "fix_init": False,
    "embed_norm_layer": None, "norm_layer": None, "act_layer": None, "attn_layer": "attn",
}  # fmt: skip
"""Arguments of timm's VisionTransformer that say "as plain as it gets", written all the same: the
entry points have defaults of their own."""


def architecture(arguments: Mapping[str, Any]) -> str:
    """Return the entry point of timm that builds the blocks of this MegaVit."""
    parallel = arguments.get("parallel", True)
    return "vit_base_patch16_xp_224" if parallel else "vit_base_patch16_224"


def model_args(arguments: Mapping[str, Any], sides: Sequence[int]) -> dict[str, Any]:
    """Return all arguments of timm's VisionTransformer that a config.json can hold.

    Args:
        arguments: constructor arguments of the MegaVit.
        sides: its `image_size`, [height, width].
    """
    pool = arguments.get("pool", "cls")
    return _UNUSED | {
        "img_size": list(sides),
        "in_chans": arguments.get("channels", 3),
        "patch_size": arguments["patch_size"],
        "embed_dim": arguments["dim"],
        "depth": arguments["depth"],
        "num_heads": arguments["heads"],
        "mlp_ratio": mlp_ratio(arguments),
        "qkv_bias": False,
        "proj_bias": arguments.get("parallel", True),
        "qk_norm": arguments.get("qk_norm", True),
        "init_values": init_values(arguments),
        "class_token": pool == "cls",
        "no_embed_class": True,
        "global_pool": _POOLS[pool],
        "fc_norm": False,
        "drop_path_rate": arguments.get("stochastic_depth", 0.0),
        "proj_drop_rate": arguments.get("dropout", 0.0),
        "pos_drop_rate": arguments.get("emb_dropout", 0.0),
    }


def tensors(
    own: Mapping[str, StoredTensor], arguments: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Return the weights of a MegaVit under timm's names, its patch embedding as a convolution."""
    patch, channels = arguments["patch_size"], arguments.get("channels", 3)

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
    return with_zero_biases(made, _wants_bias)


def _flattened(table: Tensor) -> Tensor:
    return table.flatten(1, 2)


def _wants_bias(module: str) -> bool:
    leaf = module.rsplit(".", 1)[-1]
    return leaf in _NORMS or leaf == "attn_out_proj"
