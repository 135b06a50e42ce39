"""NaViT as timm's NaFlexVit.

Parameters carry timm's names already. The options are written as fields of timm's `NaFlexVitCfg`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zeta.export.timm.options import pool_args, rate_args, size_args
from zeta.models.position import POSITIONS, table_of
from zeta.models.rotary import DINOV3_BASE
from zeta.stored_tensors import StoredTensor, zeros

FIXED_SIZE = False
FIRST_LAYER = "embeds.proj"

_POSITIONS: dict[str | None, dict[str, Any]] = {
    None: {"pos_embed": "none"},
    "fractional": {"pos_embed": "factorized"},
    "fractional_aspect": {"pos_embed": "factorized", "pos_embed_ar_preserving": True},
    "grid_bicubic": {"pos_embed": "learned"},
    "grid_bilinear": {"pos_embed": "learned", "pos_embed_interp_mode": "bilinear"},
}
"""Fields of timm for our position tables."""
_ROPES = {"separate": "dinov3", "index": "axial"}
"""`rope_type` of timm for our units of rotary coordinates."""
_BIASED = (".attn.proj.weight", ".mlp.fc1.weight", ".mlp.fc2.weight")
"""Weights beside which timm's blocks with rotary positions always have a bias."""
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
"""Fields of `NaFlexVitCfg` that our models do not use. They are written all the same, so that
neither the entry point's defaults nor those of another version of timm decide."""


def entry_point(arguments: Mapping[str, Any]) -> str:
    """Return an entry point of timm that takes any `NaFlexVitCfg`; all its sizes are replaced."""
    return "naflexvit_base_patch16_map"


def obstacle(arguments: Mapping[str, Any]) -> str | None:
    """Return which option of a NaViT NaFlexVit does not support; None if it supports all."""
    position = arguments["position"]
    if table_of(position) not in _POSITIONS:
        known = [name for name in POSITIONS if table_of(name) in _POSITIONS]
        return (
            f"model.position is {position}: timm's NaFlexVit has no such coordinates; train with "
            f"one of {', '.join(known)} to export to timm"
        )
    if _is_rotary(arguments) and (units := _units(arguments)) not in _ROPES:
        return (
            f"model.rope_coordinates is {units}: timm's NaFlexVit has no such coordinates; train "
            f"with one of {', '.join(_ROPES)} to export to timm"
        )
    return None


def _is_rotary(arguments: Mapping[str, Any]) -> bool:
    position = POSITIONS.get(arguments["position"])
    return position is not None and position.rotary


def _units(arguments: Mapping[str, Any]) -> str:
    return str(arguments["rope_coordinates"] or "separate")


def model_args(arguments: Mapping[str, Any], sides: Sequence[int]) -> dict[str, Any]:
    """Return all fields of `NaFlexVitCfg`, and the channels.

    Args:
        arguments: constructor arguments of the NaViT, defaults included.
        sides: its `image_size`, [height, width] in pixels.
    """
    bias = arguments["bias"]
    return _UNUSED | {
        **size_args(arguments, qkv_bias=bias, proj_bias=bias),
        "reg_tokens": arguments["registers"],
        "pos_embed_grid_size": [side // arguments["patch_size"] for side in sides],
        **pool_args(arguments),
        "act_layer": _ACTIVATIONS[arguments["activation"]],
        **rate_args(arguments),
        **_POSITIONS[table_of(arguments["position"])],
        **(_rope_args(arguments) if _is_rotary(arguments) else {}),
    }


def _rope_args(arguments: Mapping[str, Any]) -> dict[str, Any]:
    grid = arguments["rope_grid"]
    return {
        "rope_type": _ROPES[_units(arguments)],
        "rope_temperature": float(arguments["rope_base"] or DINOV3_BASE),
        "rope_ref_feat_shape": None if grid is None else list(grid),
        "rope_rotate_half": True,
        "rope_shift_coords": arguments["rope_shift"],
        "rope_jitter_coords": arguments["rope_jitter"],
        "rope_rescale_coords": arguments["rope_rescale"],
    }


def tensors(
    own: Mapping[str, StoredTensor], arguments: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Return the weights of a NaViT, which carry timm's names already.

    With rotary positions timm builds other blocks: their layer scale has another name, and their
    linear layers always have biases.
    """
    if not _is_rotary(arguments):
        return dict(own)
    made: dict[str, StoredTensor] = {}
    for name, tensor in own.items():
        made[name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")] = tensor
        bias = name.replace(".weight", ".bias")
        if name.startswith("blocks.") and name.endswith(_BIASED) and bias not in own:
            made[bias] = zeros(tensor.shape[:1], tensor.dtype)
    return made
