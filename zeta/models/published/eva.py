"""timm's `Eva`: DINOv3 and EVA-02, from a folder that timm or the Hub laid out.

The config of such a folder names an architecture only, so timm itself, which must be installed,
says what it is made of: the model is built on the meta device, without weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zeta.models.published.asking_timm import activation, timm_model
from zeta.models.published.tensors import Renaming, grid_table, token_with_position
from zeta.stored_tensors import StoredTensor, stacked

ARCHITECTURES = re.compile(r"eva|dinov3|lingbot|vit_pe_|_rope_")
"""Part of the names of timm's architectures that are an `Eva`."""
_POOLS = {"token": "cls", "avg": "mean"}
_ROPES = {"RotaryEmbeddingDinoV3": "separate", "RotaryEmbeddingCat": "index"}
"""Our units of rotary coordinates for timm's modules."""


def eva(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, Any], Renaming]:
    """Return the arguments of the NaViT and its weights.

    Raises:
        ValueError: timm is not installed, or something that NaViT does not have, by name.
    """
    theirs = _model(config)
    block, embed = theirs.blocks[0], theirs.patch_embed
    dim, heads, head = theirs.embed_dim, block.attn.num_heads, block.attn.head_dim
    pool = _POOLS.get(theirs.global_pool)
    if type(block).__name__ != "EvaBlock":
        raise ValueError("use_post_norm: NaViT normalises before attention and MLP, not after them")
    if pool is None:
        raise ValueError(f"global_pool is {theirs.global_pool}: NaViT pools an Eva by token or avg")
    gated = type(block.mlp).__name__ in ("SwiGLU", "GluMlp")
    height, width = embed.grid_size
    patch = embed.patch_size[0]
    classes = theirs.cls_token is not None
    prefix = int(classes) + (0 if theirs.reg_token is None else theirs.reg_token.shape[1])
    arguments: dict[str, Any] = {
        "arch": "navit",
        "image_size": [height * patch, width * patch],
        "patch_size": patch,
        "dim": dim,
        "depth": len(theirs.blocks),
        "heads": heads,
        "dim_head": head,
        "mlp_dim": block.mlp.fc2.in_features,
        "channels": embed.proj.in_channels,
        "norm_eps": block.norm1.eps,
        "activation": activation(block.mlp.act),
        "qk_norm": type(block.attn.q_norm).__name__ != "Identity",
        "bias": True,
        "pool": pool,
        # A class token that is not pooled is one more register.
        "registers": prefix - int(pool == "cls"),
        "layer_scale": None if block.gamma_1 is None else 1.0,
        "gated_mlp": gated,
        "mlp_norm": type(block.mlp.norm).__name__ != "Identity",
        "pre_norm": type(theirs.norm_pre).__name__ != "Identity",
        "norm_after_pool": type(theirs.fc_norm).__name__ != "Identity",
        **_position(theirs),
    }
    if arguments["norm_after_pool"] == (type(theirs.norm).__name__ != "Identity"):
        raise ValueError("use_fc_norm: NaViT normalises once at the end, before or after pooling")
    renaming = Renaming(tensors)
    _embeddings(renaming, (height, width), pool)
    half = not getattr(block.attn, "rotate_half", False) and theirs.rope is not None
    for i in range(arguments["depth"]):
        arguments["qkv_bias"] = _attention(renaming, f"blocks.{i}", (heads, head), paired=half)
        _rest(renaming, f"blocks.{i}", arguments)
    if arguments["pre_norm"]:
        renaming.move("embeds.norm_pre", "norm_pre")
    last = "fc_norm" if arguments["norm_after_pool"] else "norm"
    renaming.move(last, last)
    if renaming.has("head.weight"):
        renaming.move("head", "head")
    return arguments, renaming


def _model(config: Mapping[str, Any]) -> Any:
    """Return timm's model on the meta device.

    Raises:
        ValueError: as `timm_model`, or it is no Eva.
    """
    model = timm_model(config)
    if type(model).__name__ != "Eva":
        raise ValueError(
            f"{config['architecture']} is a {type(model).__name__} of timm, not an Eva"
        )
    return model


def _position(theirs: Any) -> dict[str, Any]:
    if theirs.rope is None:
        return {"position": "grid_bicubic"}
    kind = type(theirs.rope).__name__
    if kind not in _ROPES:
        raise ValueError(f"rope_type: NaViT does not have the rotary positions of {kind}")
    rope = theirs.rope
    if rope.grid_indexing != "ij" or rope.grid_offset:
        raise ValueError("rope_grid_indexing, rope_grid_offset: NaViT counts (y, x) from 0 only")
    found = {
        "position": "rope" if theirs.pos_embed is None else "rope+grid_bicubic",
        "rope_base": float(rope.temperature),
        "rope_coordinates": _ROPES[kind],
        "rope_shift": rope.shift_coords,
        "rope_jitter": rope.jitter_coords,
        "rope_rescale": rope.rescale_coords,
    }
    if kind == "RotaryEmbeddingDinoV3":
        return found | {"rope_coordinates": rope.normalize_coords}
    if rope.ref_feat_shape is not None:
        found["rope_grid"] = [int(side) for side in rope.ref_feat_shape]
    return found


def _embeddings(renaming: Renaming, grid: tuple[int, int], pool: str) -> None:
    renaming.patches("patch_embed.proj")
    tokens = [renaming.take(n) for n in ("cls_token", "reg_token") if renaming.has(n)]
    if renaming.has("pos_embed"):
        table = renaming.take("pos_embed")
        prefix = sum(token.shape[1] for token in tokens)
        skipped = table.shape[1] - grid[0] * grid[1]
        renaming.made["embeds.pos_embed"] = grid_table(table, grid, prefix if skipped else 0)
        row = 0
        for i, token in enumerate(tokens if skipped else []):
            tokens[i] = token_with_position(token, table, row)
            row += token.shape[1]
    if pool == "cls":
        renaming.made["embeds.cls_token"] = tokens.pop(0)
    if tokens:
        renaming.made["embeds.reg_token"] = _side_by_side(tokens)


def _side_by_side(tokens: list[StoredTensor]) -> StoredTensor:
    count, dim = sum(token.shape[1] for token in tokens), tokens[0].shape[2]
    rows = stacked([token.changed(lambda t: t[0], token.shape[1:]) for token in tokens])
    return rows.changed(lambda t: t[None], (1, count, dim))


def _attention(renaming: Renaming, name: str, heads: tuple[int, int], *, paired: bool) -> str:
    """Take queries, keys and values, fused or not; return which have a bias.

    Args:
        renaming: the weights.
        name: of the block.
        heads: number of heads, and channels of each.
        paired: whether neighbouring channels are the axes of a plane that is rotated: they are
            brought into our order, which changes no product of a query and a key.
    """
    attn, made = f"{name}.attn", renaming.made
    if renaming.has(f"{attn}.qkv.weight"):
        made[f"{attn}.qkv.weight"] = renaming.take(f"{attn}.qkv.weight")
        biases = "none"
        if renaming.has(f"{attn}.q_bias"):
            biases = "qv"
            for part in "qv":
                made[f"{attn}.{part}_bias"] = renaming.take(f"{attn}.{part}_bias")
        elif renaming.has(f"{attn}.qkv.bias"):
            biases = "all"
            made[f"{attn}.qkv.bias"] = renaming.take(f"{attn}.qkv.bias")
    else:
        biases = renaming.qkv(attn, *(f"{attn}.{part}_proj" for part in "qkv"))
    for part in ("q_norm", "k_norm"):
        if renaming.has(f"{attn}.{part}.weight"):
            renaming.move(f"{attn}.{part}", f"{attn}.{part}")
    renaming.move(f"{attn}.proj", f"{attn}.proj", bias=True)
    if paired:
        for own in [n for n in made if n.startswith(f"{attn}.") and ".proj." not in n]:
            if not own.endswith("v_bias"):
                made[own] = _unpaired(made[own], *heads, parts=3 if ".qkv." in own else 1)
    return biases


def _unpaired(tensor: StoredTensor, heads: int, head: int, *, parts: int) -> StoredTensor:
    """Put the first channels of all planes of a head before the second ones, but for values."""
    order = torch.cat([torch.arange(0, head, 2), torch.arange(1, head, 2)])
    count = tensor.shape[0] // head  # heads of queries, keys and values, or one norm of all heads
    turned = count if parts == 1 else 2 * heads
    rows = torch.arange(count)[:, None] * head + torch.arange(head)
    rows[:turned] = rows[:turned, order]

    def change(whole: Tensor) -> Tensor:
        return whole[rows.flatten()]

    return tensor.changed(change)


def _rest(renaming: Renaming, name: str, arguments: Mapping[str, Any]) -> None:
    for number in (1, 2):
        renaming.move(f"{name}.norm{number}", f"{name}.norm{number}")
        if arguments["layer_scale"] is not None:
            scale = renaming.take(f"{name}.gamma_{number}")
            renaming.made[f"{name}.ls{number}.gamma"] = scale
    if renaming.has(f"{name}.mlp.fc1_g.weight"):
        renaming.stack(f"{name}.mlp.fc1", (f"{name}.mlp.fc1_g", f"{name}.mlp.fc1_x"), bias=True)
    else:
        renaming.move(f"{name}.mlp.fc1", f"{name}.mlp.fc1", bias=True)
    if arguments["mlp_norm"]:
        renaming.move(f"{name}.mlp.norm", f"{name}.mlp.norm")
    renaming.move(f"{name}.mlp.fc2", f"{name}.mlp.fc2", bias=True)
