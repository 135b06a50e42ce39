"""NaViT in the words of timm's NaFlexVit.

Parameters carry timm's names already. What is left: the biases that timm insists on are zeros, and
the options are spelled as fields of timm's `NaFlexVitCfg`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zeta.export.timm.common import init_values, mlp_ratio, with_zero_biases
from zeta.stored_tensors import StoredTensor

ARCHITECTURE = "naflexvit_base_patch16_map"
"""An entry point of timm that takes any `NaFlexVitCfg`; its own sizes are all replaced."""

_NORMS = ("norm1", "norm2", "q_norm", "k_norm", "norm")
_POOL_LINEARS = ("q", "kv", "proj", "fc1", "fc2")
_POSITIONS: dict[str, dict[str, Any]] = {
    "fractional": {"pos_embed": "factorized"},
    "fractional_aspect": {"pos_embed": "factorized", "pos_embed_ar_preserving": True},
    "grid_bicubic": {"pos_embed": "learned"},
    "grid_bilinear": {"pos_embed": "learned", "pos_embed_interp_mode": "bilinear"},
}
"""Our position tables in timm's fields."""
_POOLS = {"attention": "map", "mean": "avg", "cls": "token"}
"""Our pooling -> timm's `global_pool`; all leave registers out."""
_ACTIVATIONS = {"gelu": None, "gelu_tanh": "gelu_tanh"}
_UNUSED: dict[str, Any] = {
    "scale_mlp_norm": False, "num_kv_heads": None, "attn_drop_rate": 0.0,
    "scale_attn_inner_norm": False, "use_key_only_attn_mask": False, "drop_rate": 0.0,
    "patch_drop_rate": 0.0, "pos_embed_interp_mode": "bicubic", "pos_embed_antialias": True,
    "pos_embed_ar_preserving": False,
    "pos_embed_align_corners": False, "pos_embed_use_grid_sample": False, "rope_type": "",
    "rope_temperature": 10000.0, "rope_ref_feat_shape": None, "rope_grid_offset": 0.0,
    "rope_grid_indexing": "ij", "rope_rotate_half": False, "rope_shift_coords": None,
    "rope_jitter_coords": None, "rope_rescale_coords": None, "rope_mrope_section": None,
    "dynamic_img_pad": False, "patchify_channels_last": True, "pre_norm": False,
    "final_norm": True, "pool_include_prefix": False, "attn_pool_num_heads": None,
    "attn_pool_mlp_ratio": None, "weight_init": "", "fix_init": True,
    "embed_proj_type": "linear", "input_norm_layer": None, "embed_norm_layer": None,
    "norm_layer": None, "block_fn": None, "mlp_layer": None,
    "attn_layer": None, "attn_type": "standard", "attn_gated": False, "swiglu_mlp": False,
    "swiglu_align_to": 0, "qkv_fused": True, "attn_only_layer_scale": False,
    "enable_patch_interpolator": False,
}  # fmt: skip
"""Fields of `NaFlexVitCfg` that say "as plain as it gets": written all the same, so that neither
the entry point's defaults nor those of another version of timm decide."""


def obstacle(arguments: Mapping[str, Any]) -> str | None:
    """Return which option of a NaViT NaFlexVit has no word for; None if it has all."""
    position = arguments.get("position", "fractional")
    if position not in _POSITIONS:
        return (
            f"model.position is {position}: timm's NaFlexVit has no such coordinates; train with "
            f"one of {', '.join(_POSITIONS)} to export to timm"
        )
    return None


def model_args(arguments: Mapping[str, Any], sides: Sequence[int]) -> dict[str, Any]:
    """Return all fields of `NaFlexVitCfg`, and the channels.

    Args:
        arguments: constructor arguments of the NaViT.
        sides: its `image_size`, [height, width].
    """
    pool = arguments.get("pool", "attention")
    return _UNUSED | {
        "in_chans": arguments.get("channels", 3),
        "patch_size": arguments["patch_size"],
        "embed_dim": arguments["dim"],
        "depth": arguments["depth"],
        "num_heads": arguments["heads"],
        "mlp_ratio": mlp_ratio(arguments),
        "qkv_bias": arguments.get("bias", False),
        "proj_bias": arguments.get("bias", False),
        "qk_norm": arguments.get("qk_norm", True),
        "init_values": init_values(arguments),
        "class_token": pool == "cls",
        "reg_tokens": arguments.get("registers", 0),
        "pos_embed_grid_size": [side // arguments["patch_size"] for side in sides],
        "global_pool": _POOLS[pool],
        "fc_norm": False,
        "act_layer": _ACTIVATIONS[arguments.get("activation", "gelu")],
        "drop_path_rate": arguments.get("stochastic_depth", 0.0),
        "proj_drop_rate": arguments.get("dropout", 0.0),
        "pos_drop_rate": arguments.get("emb_dropout", 0.0),
        **_POSITIONS[arguments.get("position", "fractional")],
    }


def tensors(own: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the weights of a NaViT with zeros for the biases that NaFlexVit has besides."""
    return with_zero_biases(own, _wants_bias)


def _wants_bias(module: str) -> bool:
    leaf = module.rsplit(".", 1)[-1]
    in_pool = module.startswith("attn_pool.") and leaf in _POOL_LINEARS
    return module == "embeds.proj" or leaf in _NORMS or in_pool
