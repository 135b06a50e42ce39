"""A plain ViT or a NaFlexVit of timm, or SigLIP's vision tower alone, and what NaViT equals it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from zeta.models.position import ROPE
from zeta.models.published.tensors import Renaming
from zeta.models.published.timm_names import TOWER, named_as_navit
from zeta.models.published.timm_weights import (
    TimmWeights,
    activation,
    checked,
    grid_of,
    patch_of,
    told_grid,
)
from zeta.stored_tensors import StoredTensor, zeros

TABLE = "embeds.pos_embed"
FACTORS = ("embeds.pos_embed_y", "embeds.pos_embed_x")
_HEAD = "head."
_MLP = "blocks.0.mlp.fc1.weight"
_GRID = (16, 16)
_ROPES = {"dinov3": "separate", "axial": "index"}
"""Our units of rotary coordinates for timm's `rope_type`."""
_LAYER = r"(weight|bias)"
_KNOWN = re.compile(
    rf"(embeds\.(proj|norm_pre)|norm|fc_norm|head|attn_pool\.(q|kv|proj|norm|mlp\.fc[12]))\.{_LAYER}"
    r"|embeds\.(cls_token|reg_token|pos_embed(_[yx])?)|attn_pool\.latent"
    rf"|blocks\.\d+\.((norm[12]|attn\.(qkv|proj|[qk]_norm)|mlp\.(fc[12]|norm))\.{_LAYER}"
    r"|attn\.[qv]_bias|ls[12]\.gamma)"
)
"""Names of a NaViT's weights; it has no others."""


def plain_vit(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, Any], Renaming]:
    """Return the arguments of the NaViT and its weights, of a ViT or NaFlexVit of timm.

    Raises:
        ValueError: something that NaViT does not have, or heads that nothing tells.
    """
    weights = checked(config, tensors)
    found = navit_arguments(weights)
    arguments = {n: v for n, v in found.items() if n not in ("mean", "std")} | {"arch": "navit"}
    renaming = Renaming({})
    renaming.made = with_biases(named_as_navit(tensors, told_grid(weights)), arguments)
    if unknown := [name for name in renaming.made if not _KNOWN.fullmatch(name)]:
        raise ValueError(f"NaViT does not have what {unknown[0]} belongs to")
    renaming.notes.extend(weights.notes)
    return arguments, renaming


def with_biases(
    tensors: Mapping[str, StoredTensor], arguments: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Return weights by NaViT's names with the biases that a NaViT of these arguments has.

    Missing ones are zeros; of those that it has not, zeros go.
    """
    made = dict(tensors)
    qkv = arguments["qkv_bias"] or ("all" if arguments["bias"] else "none")
    for name in tensors:
        if name.endswith(".weight") and not name.startswith(_HEAD):
            bias = name.replace(".weight", ".bias")
            has = arguments["bias"]
            if name.endswith(".attn.qkv.weight"):
                has = qkv == "all"
            elif name == "embeds.proj.weight":
                has = has and not arguments["pre_norm"]
            if has and bias not in made:
                made[bias] = zeros(made[name].shape[:1], torch.float32)
            elif not has and bias in made and not made[bias].read().any():
                del made[bias]
    return made


def navit_arguments(
    weights: TimmWeights, heads: int | None = None, image_size: Any = None
) -> dict[str, Any]:
    """Return the arguments of the NaViT with the same outputs as the source of `weights`.

    Args:
        weights: published weights.
        heads: number of attention heads, if neither the config nor a norm of the queries gives it.
        image_size: size of the position table in pixels, if it is not square.

    Raises:
        ValueError: something that NaViT does not support, or the number of heads is unknown.
    """
    channels, patch = patch_of(weights)
    own = named_as_navit(weights.tensors, grid_of(image_size, patch) or told_grid(weights))
    after = "fc_norm.weight" in own
    norm, mlp = own.get("fc_norm.weight" if after else "norm.weight"), own.get(_MLP)
    if norm is None or mlp is None:
        raise ValueError(
            f"the weights have no {'norm' if norm is None else 'blocks.0.mlp.fc1'}: their blocks "
            "are not those of a plain ViT"
        )
    dim = norm.shape[0]
    q_norm, scale = own.get("blocks.0.attn.q_norm.weight"), own.get("blocks.0.ls1.gamma")
    heads = heads or weights.option("num_heads", "num_attention_heads")
    if heads is None and q_norm is not None:
        heads = dim // q_norm.shape[0]
    if heads is None:
        raise ValueError(
            "the weights do not give the number of attention heads: give it, as in heads=12 "
            "(zeta import SRC OUT --heads 12)"
        )
    lengths = [own[name].shape[1] for name in FACTORS if name in own]
    grid = own[TABLE].shape[1:3] if TABLE in own else lengths
    if not grid:  # rotary positions alone: any grid will do
        grid = weights.option("pos_embed_grid_size") or _GRID
    registers = own.get("embeds.reg_token")
    second = own.get(_MLP.replace("fc1", "fc2"))
    gated = second is not None and mlp.shape[0] == 2 * second.shape[1]
    bias = any(is_bias(name) and tensor.read().any() for name, tensor in own.items())
    return {
        "image_size": [side * patch for side in grid],
        "patch_size": patch,
        "num_classes": own["head.weight"].shape[0] if "head.weight" in own else 1,
        "dim": dim,
        "depth": len({name.split(".")[1] for name in own if name.startswith("blocks.")}),
        "heads": heads,
        "dim_head": dim // heads,
        "mlp_dim": mlp.shape[0] // (2 if gated else 1),
        "channels": channels,
        "position": _position(weights, own),
        "pool": _pool(weights, own),
        "registers": 0 if registers is None else registers.shape[1],
        "layer_scale": None if scale is None else 1.0,
        "qk_norm": q_norm is not None,
        "bias": bias,
        "activation": "silu" if gated else activation(weights),
        "gated_mlp": gated,
        "mlp_norm": "blocks.0.mlp.norm.weight" in own,
        "pre_norm": "embeds.norm_pre.weight" in own,
        "norm_after_pool": after,
        "qkv_bias": _qkv_bias(own, bias=bias),
        **_rope(weights),
        **_norm_eps(weights),
        **weights.pixels(channels),
    }


def _position(weights: TimmWeights, own: Mapping[str, StoredTensor]) -> str:
    rotary = weights.option("rope_type") not in (None, "", "none")
    keeps_aspect = bool(weights.option("pos_embed_ar_preserving"))
    if rotary and TABLE not in own and FACTORS[0] not in own:
        return ROPE
    table = _table(weights, own, keeps_aspect=keeps_aspect)
    return f"{ROPE}+{table}" if rotary else table


def _rope(weights: TimmWeights) -> dict[str, Any]:
    """Return the options of rotary positions; none if there are no rotary positions."""
    kind = weights.option("rope_type")
    if kind in (None, "", "none"):
        return {}
    if kind not in _ROPES:
        raise ValueError(f"rope_type is {kind}: NaViT has {', '.join(_ROPES)}")
    if not weights.option("rope_rotate_half"):
        raise ValueError(
            "rope_rotate_half is false: NaViT turns the halves of a head, not neighbouring channels"
        )
    grid = weights.option("rope_ref_feat_shape")
    return {
        "rope_coordinates": _ROPES[kind],
        "rope_base": weights.option("rope_temperature"),
        "rope_grid": None if grid is None else list(grid),
        "rope_shift": weights.option("rope_shift_coords"),
        "rope_jitter": weights.option("rope_jitter_coords"),
        "rope_rescale": weights.option("rope_rescale_coords"),
    }


def _norm_eps(weights: TimmWeights) -> dict[str, float]:
    eps = weights.option("norm_eps", "layer_norm_eps")
    return {} if eps is None else {"norm_eps": float(eps)}


def _qkv_bias(own: Mapping[str, StoredTensor], *, bias: bool) -> str | None:
    """Return which of queries, keys and values have a bias; None: as all other layers."""
    attention = "blocks.0.attn"
    if f"{attention}.q_bias" in own:
        return "qv"
    return None if (f"{attention}.qkv.bias" in own) == bias else ("none" if bias else "all")


def _table(weights: TimmWeights, own: Mapping[str, StoredTensor], *, keeps_aspect: bool) -> str:
    if TABLE not in own:
        if FACTORS[0] not in own:
            raise ValueError("the weights have no position table, which NaViT needs")
        return "fractional_aspect" if keeps_aspect else "fractional"
    if keeps_aspect:
        raise ValueError(
            "pos_embed_ar_preserving: NaViT resizes a grid of positions to each side on its own"
        )
    siglip = any(name.startswith(TOWER) for name in weights.tensors)
    bilinear = siglip or weights.option("pos_embed_interp_mode") == "bilinear"
    if not bilinear and weights.option("pos_embed_antialias") is False:
        return "grid_bicubic_plain"
    return "grid_bilinear" if bilinear else "grid_bicubic"


def _pool(weights: TimmWeights, own: Mapping[str, StoredTensor]) -> str:
    if "attn_pool.latent" in own:
        return "attention"
    found = "cls" if "embeds.cls_token" in own else "mean"
    given = weights.option("global_pool")
    if given not in (None, {"cls": "token", "mean": "avg"}[found]):
        raise ValueError(f"global_pool is {given}: NaViT pools these weights by {found} only")
    return found


def is_bias(name: str) -> bool:
    """Return whether a weight is a bias, but not the head's."""
    return name.endswith(".bias") and not name.startswith(_HEAD)
