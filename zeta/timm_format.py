"""Export to timm: `timm.create_model("local-dir:OUT", pretrained=True)` gives the same logits.

Parameters carry timm's NaFlexVit names already. What is left to do: the biases that timm insists
on are written as zeros, and the options are spelled as fields of timm's `NaFlexVitCfg` (checked
against timm 1.0.31). timm takes float images that are normalised with `pretrained_cfg`'s mean and
std.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zeta.pretrained import preprocessing, whole_directory, write_config, write_weights

_NORMS = ("norm1", "norm2", "q_norm", "k_norm", "norm")
_POOL_LINEARS = ("q", "kv", "proj", "fc1", "fc2")
_POSITIONS = {"fractional": False, "fractional_aspect": True}
"""Our coordinate system -> timm's `pos_embed_ar_preserving`."""
_POOLS = {"attention": "map", "mean": "avg"}
"""Our pooling -> timm's `global_pool`; both leave registers out."""


def save_timm(
    out_dir: Path | str, state_dict: Mapping[str, Tensor], model_arguments: Mapping[str, Any]
) -> Path:
    """Write a NaViT to `out_dir` as a timm model directory and return its path.

    Args:
        out_dir: new directory; one that holds an export already is replaced as a whole.
        state_dict: whole weights of the model, buffers mean and std included.
        model_arguments: `ModelConfig.resolve()`: arch and constructor arguments.

    Raises:
        ValueError: an option that timm's NaFlexVit has no word for, by name; or `out_dir` exists
            and is no export.
    """
    config = timm_config(state_dict, model_arguments)
    with whole_directory(out_dir) as partial:
        write_weights(partial, timm_state_dict(state_dict))
        write_config(partial, config)
    return Path(out_dir)


def timm_config(
    state_dict: Mapping[str, Tensor], model_arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return timm's config.json for this model."""
    arguments = dict(model_arguments)
    _refuse(arguments)
    dim, mlp_dim = arguments["dim"], arguments["mlp_dim"]
    side, patch_size = arguments["image_size"], arguments["patch_size"]
    sides = [side, side] if isinstance(side, int) else list(side)
    channels = arguments.get("channels", 3)
    pixels = preprocessing(state_dict, arguments)
    return {
        "architecture": "naflexvit_base_patch16_map",
        "num_classes": arguments["num_classes"],
        "pretrained_cfg": {
            "input_size": [channels, *sides],
            "num_classes": arguments["num_classes"],
            "mean": pixels["mean"],
            "std": pixels["std"],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "first_conv": "embeds.proj",
            "classifier": "head",
        },
        "model_args": {
            "in_chans": channels,
            "patch_size": patch_size,
            "embed_dim": dim,
            "depth": arguments["depth"],
            "num_heads": arguments["heads"],
            # timm rounds dim * mlp_ratio down; the half keeps float error from losing a channel.
            "mlp_ratio": (mlp_dim + 0.5) / dim,
            "qkv_bias": False,
            "proj_bias": False,
            "qk_norm": True,
            "init_values": arguments.get("layer_scale"),
            "class_token": False,
            "reg_tokens": arguments.get("registers", 0),
            "pos_embed": "factorized",
            "pos_embed_grid_size": [length // patch_size for length in sides],
            "pos_embed_ar_preserving": _POSITIONS[arguments.get("position", "fractional")],
            "global_pool": _POOLS[arguments.get("pool", "attention")],
            "fc_norm": False,
            "drop_path_rate": arguments.get("stochastic_depth", 0.0),
            "proj_drop_rate": arguments.get("dropout", 0.0),
            "pos_drop_rate": arguments.get("emb_dropout", 0.0),
        },
    }


def timm_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under timm's names, with zeros for the biases that timm insists on."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name in ("mean", "std"):
            continue
        tensors[name] = tensor
        module = name.removesuffix(".weight")
        if module != name and _wants_bias(module):
            tensors[f"{module}.bias"] = torch.zeros(tensor.shape[0], dtype=tensor.dtype)
    tensors["head.bias"] = state_dict["head.bias"]
    return tensors


def _wants_bias(module: str) -> bool:
    leaf = module.rsplit(".", 1)[-1]
    in_pool = module.startswith("attn_pool.") and leaf in _POOL_LINEARS
    return module == "embeds.proj" or leaf in _NORMS or in_pool


def _refuse(arguments: dict[str, Any]) -> None:
    if arguments.get("arch", "navit") != "navit":
        raise ValueError(
            f"model.arch is {arguments['arch']}: timm's NaFlexVit expresses navit only"
        )
    position = arguments.get("position", "fractional")
    if position not in _POSITIONS:
        raise ValueError(
            f"model.position is {position}: timm's NaFlexVit has no such coordinates; train with "
            f"one of {', '.join(_POSITIONS)} to export to timm"
        )
    dim, heads = arguments["dim"], arguments["heads"]
    dim_head = arguments.get("dim_head") or dim // heads
    if heads * dim_head != dim:
        raise ValueError(
            f"model.heads x model.dim_head is {heads} x {dim_head}, not model.dim={dim}: timm's "
            "NaFlexVit needs them equal"
        )
