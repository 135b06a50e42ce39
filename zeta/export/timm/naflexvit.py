"""NaViT as timm's NaFlexVit.

Parameters carry timm's names already. The options are written as fields of timm's `NaFlexVitCfg`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zeta.export.timm.options import pool_args, rate_args, size_args
from zeta.models.position import POSITIONS, table_of
from zeta.models.rotary import DINOV3_BASE
from zeta.stored_tensors import StoredTensor, halves, ones, zeros

FIXED_SIZE = False
FIRST_LAYER = "embeds.proj"

_POSITIONS: dict[str | None, dict[str, Any]] = {
    None: {"pos_embed": "none"},
    "fractional": {"pos_embed": "factorized"},
    "fractional_aspect": {"pos_embed": "factorized", "pos_embed_ar_preserving": True},
    "grid_bicubic": {"pos_embed": "learned"},
    "grid_bilinear": {"pos_embed": "learned", "pos_embed_interp_mode": "bilinear"},
    "grid_bicubic_plain": {"pos_embed": "learned", "pos_embed_antialias": False},
}
"""Fields of timm for our position tables."""
_ROPES = {"separate": "dinov3", "index": "axial"}
"""`rope_type` of timm for our units of rotary coordinates."""
_BIASED = (".attn.proj.weight", ".mlp.fc1.weight", ".mlp.fc2.weight")
"""Weights beside which timm's `EvaBlock` always has a bias."""
_ACTIVATIONS = {
    "gelu": None, "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu",
}  # fmt: skip
_NORM_EPS = 1e-6
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
    if arguments["norm_eps"] != _NORM_EPS:
        return (
            f"model.norm_eps is {arguments['norm_eps']}: the norms of timm's NaFlexVit have "
            f"{_NORM_EPS} only"
        )
    if arguments["pooler"]:
        return "model.pooler is true: timm's NaFlexVit has no layer after the pooling"
    if arguments["gated_mlp"] and arguments["activation"] != "silu":
        return (
            f"model.gated_mlp is true and model.activation {arguments['activation']}: the gated "
            "MLPs of timm's NaFlexVit have silu only"
        )
    return None


def _qkv_bias(arguments: Mapping[str, Any]) -> str:
    return arguments["qkv_bias"] or ("all" if arguments["bias"] else "none")


def _has_eva_blocks(arguments: Mapping[str, Any]) -> bool:
    """Return whether timm builds its `EvaBlock`, which alone has these options."""
    return _is_rotary(arguments) or arguments["gated_mlp"] or _qkv_bias(arguments) == "qv"


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
        **size_args(arguments, qkv_bias=_qkv_bias(arguments) != "none", proj_bias=bias),
        "reg_tokens": arguments["registers"],
        "pos_embed_grid_size": [side // arguments["patch_size"] for side in sides],
        **pool_args(arguments),
        "act_layer": _ACTIVATIONS[arguments["activation"]],
        "pre_norm": arguments["pre_norm"],
        "swiglu_mlp": arguments["gated_mlp"],
        "scale_mlp_norm": arguments["mlp_norm"],
        "attn_type": _attention_type(arguments),
        **_layer_scale(arguments),
        **rate_args(arguments),
        **_POSITIONS[table_of(arguments["position"])],
        **(_rope_args(arguments) if _is_rotary(arguments) else {}),
    }


def _layer_scale(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the initial layer scale of an `EvaBlock`, to which 0 is no word for none: ones."""
    scaled = arguments["layer_scale"] is not None
    return {} if scaled or not _has_eva_blocks(arguments) else {"init_values": 1.0}


def _attention_type(arguments: Mapping[str, Any]) -> str:
    if not _has_eva_blocks(arguments):
        return "standard"
    return "eva" if _qkv_bias(arguments) == "qv" else "rope"


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
    """Return the weights of a NaViT, most of which carry timm's names already.

    timm's `EvaBlock` has another name for the layer scale, its linear layers always have biases,
    and with a norm in them its gated MLPs keep the two projections apart.
    """
    eva = _has_eva_blocks(arguments)
    split = arguments["gated_mlp"] and arguments["mlp_norm"]
    made: dict[str, StoredTensor] = {}
    if eva and arguments["layer_scale"] is None:
        factor = ones((arguments["dim"],), torch.float32)
        for i in range(arguments["depth"]):
            made |= {f"blocks.{i}.gamma_1": factor, f"blocks.{i}.gamma_2": factor}
    for name, tensor in with_block_biases(own).items() if eva else own.items():
        name = name.removeprefix("embeds.") if name.startswith("embeds.norm_pre.") else name
        if eva:
            name = name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")
        if split and name.startswith("blocks.") and ".mlp.fc1." in name:
            for part, rows in zip(("fc1_g", "fc1_x"), halves(tensor), strict=True):
                made[name.replace("fc1", part)] = rows
        elif not (arguments["pre_norm"] and name == "embeds.proj.bias"):
            made[name] = tensor
    return made


def with_block_biases(own: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return `own` with a bias of zeros beside each linear layer of a block that has none."""
    made: dict[str, StoredTensor] = {}
    for name, tensor in own.items():
        made[name] = tensor
        bias = name.replace(".weight", ".bias")
        if name.startswith("blocks.") and name.endswith(_BIASED) and bias not in own:
            made[bias] = zeros(tensor.shape[:1], tensor.dtype)
    return made
