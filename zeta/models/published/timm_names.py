"""Rename the weights of published Vision Transformers as NaViT's, and bring them into its layout.

Three sources: timm's VisionTransformer, timm's NaFlexVit, and the vision tower of SigLIP and
SigLIP 2 as Hugging Face's transformers names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from zeta.stored_tensors import StoredTensor, rows_of, stacked

Tensors = Mapping[str, StoredTensor]

TOWER = "vision_model."
"""Beginning of the names of SigLIP's vision tower in Hugging Face's transformers."""
_FOREIGN = {"rope.": "has rotary positions that are learned"}
"""Beginnings of names, and what these weights do: nothing in NaViT computes it."""


_SCALES = re.compile(r"\.gamma_([12])$")
"""Names of the layer scales in timm's `EvaBlock`."""


def named_as_navit(
    tensors: Tensors, grid: tuple[int, int] | None = None
) -> dict[str, StoredTensor]:
    """Return the weights under NaViT's names; a position table as [1, h, w, C].

    Args:
        tensors: weights of a timm ViT, a NaFlexVit, or a SigLIP model (without its text tower).
        grid: (h, w) of the position table in patches; None: it is square.

    Raises:
        ValueError: something that NaViT does not support, by name.
    """
    if any(name.startswith(TOWER) for name in tensors):
        tensors = _siglip(tensors)
    for name in tensors:
        for beginning, what in _FOREIGN.items():
            if name.startswith(beginning):
                raise ValueError(f"{name}: the model {what}, which NaViT does not")
    made: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("embed.proj.weight") or name == "embeds.proj.weight":
            made["embeds.proj.weight"] = _as_linear(tensor)
        elif name == "patch_embed.proj.bias":
            made["embeds.proj.bias"] = tensor
        elif name in ("cls_token", "reg_token") or name.startswith("norm_pre."):
            made[f"embeds.{name}"] = tensor
        elif ".mlp.fc1_g." in name:
            made[name.replace("fc1_g", "fc1")] = stacked(
                [tensor, tensors[name.replace("fc1_g", "fc1_x")]]
            )
        elif name != "pos_embed" and ".mlp.fc1_x." not in name:
            made[_SCALES.sub(r".ls\1.gamma", name)] = tensor
    if "pos_embed" in tensors:
        _add_table(made, tensors["pos_embed"], grid)
    return made


def _as_linear(weight: StoredTensor) -> StoredTensor:
    """Return a convolution [C, channels, p, p] as a linear layer [C, p * p * channels]."""
    if len(weight.shape) == 2:
        return weight
    dim, channels, height, width = weight.shape
    shape = (dim, height * width * channels)
    return weight.changed(lambda kernel: kernel.permute(0, 2, 3, 1).flatten(1), shape)


def _add_table(
    made: dict[str, StoredTensor], table: StoredTensor, grid: tuple[int, int] | None
) -> None:
    """Add a table [1, N, C] to `made`; rows of class token and registers are added to these."""
    prefix = [f"embeds.{name}" for name in ("cls_token", "reg_token") if f"embeds.{name}" in made]
    num_prefix = sum(made[name].shape[1] for name in prefix)
    rows = table.shape[1]
    height, width = grid or _square(rows, num_prefix)
    skipped = rows - height * width
    if skipped not in (0, num_prefix):
        raise ValueError(
            f"pos_embed has {rows} rows, which do not fit {height} x {width} patches: set the "
            "image_size that it was trained at"
        )
    shape = (1, height, width, table.shape[2])
    made["embeds.pos_embed"] = table.changed(lambda whole: whole[:, skipped:].view(shape), shape)
    start = 0
    for name in prefix if skipped else []:
        made[name] = _sum(made[name], table, start)
        start += made[name].shape[1]


def _square(rows: int, num_prefix: int) -> tuple[int, int]:
    for patches in (rows - num_prefix, rows):
        side = math.isqrt(max(patches, 0))
        if side * side == patches:
            return side, side
    raise ValueError(f"pos_embed has {rows} rows, not a square of patches: give its image_size")


def _sum(token: StoredTensor, table: StoredTensor, start: int) -> StoredTensor:
    stop = start + token.shape[1]
    return token.changed(lambda own: own + table.read()[:, start:stop])


_SIGLIP_NAMES = {
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "post_layernorm.": "norm.",
    "head.probe": "attn_pool.latent",
    "head.layernorm.": "attn_pool.norm.",
    "head.mlp.": "attn_pool.mlp.",
    "head.attention.out_proj.": "attn_pool.proj.",
    "encoder.layers.": "blocks.",
}
_SIGLIP_PARTS = {
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
    ".self_attn.out_proj.": ".attn.proj.",
}


def _siglip(tensors: Tensors) -> dict[str, StoredTensor]:
    """Return the vision tower of a SigLIP model under timm's names."""
    tower = {n.removeprefix(TOWER): t for n, t in tensors.items() if n.startswith(TOWER)}
    made: dict[str, StoredTensor] = {}
    for name, tensor in tower.items():
        if name == "embeddings.position_embedding.weight":
            made["pos_embed"] = tensor.changed(lambda table: table[None], (1, *tensor.shape))
        elif ".self_attn.q_proj." in name:
            parts = [tower[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            made[_renamed(name.replace("self_attn.q_proj", "attn.qkv"))] = stacked(parts)
        elif name.startswith("head.attention.in_proj_"):
            kind, third = name.removeprefix("head.attention.in_proj_"), tensor.shape[0] // 3
            made[f"attn_pool.q.{kind}"] = rows_of(tensor, 0, third)
            made[f"attn_pool.kv.{kind}"] = rows_of(tensor, third, 3 * third)
        elif ".self_attn.k_proj." not in name and ".self_attn.v_proj." not in name:
            made[_renamed(name)] = tensor
    return made


def _renamed(name: str) -> str:
    for theirs, ours in _SIGLIP_NAMES.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            break
    for theirs, ours in _SIGLIP_PARTS.items():
        name = name.replace(theirs, ours)
    return name
