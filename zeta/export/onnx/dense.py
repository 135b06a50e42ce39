"""A NaViT on a batch of images of one size, in operations that `torch.export` can trace.

The packed model groups images by their lengths on the host and calls an operator of its own for
attention; neither has a graph for every size. Here all images have the size of the batch, so
attention is dense, and height and width stay symbols. Weights and layers are the model's own.

Letters in shape suffixes: B images, N tokens of an image, C channels of a token, H heads, D
channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zeta.models.layers import Attention, AttentionPool, Block
from zeta.models.navit import NaViT
from zeta.models.position import POSITIONS


class DenseNaViT(nn.Module):
    """The logits of a NaViT, of images [B, channels, height, width] that are normalised already.

    Args:
        model: the NaViT.
        embeddings: whether to return its pooled embeddings too.
    """

    def __init__(self, model: NaViT, *, embeddings: bool = False) -> None:
        super().__init__()
        self.model, self.embeddings = model.eval(), embeddings

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits [B, num_classes], and if asked for embeddings [B, dim] after them.

        Height and width are multiples of the patch.
        """
        model, patch = self.model, self.model.patch_size
        batch, channels, height, width = images.shape
        h, w = height // patch, width // patch
        cut = images.reshape(batch, channels, h, patch, w, patch).permute(0, 2, 4, 3, 5, 1)
        patches_BNP = cut.reshape(batch, h * w, patch * patch * channels)
        coords_N2, grids_N2 = _places(h, w, images.device)
        x_BNC = self._with_tokens(embedded_patches(model, patches_BNP, coords_N2, grids_N2))
        rotary = None
        if model.rotary is not None:
            rows = model.prefix_tokens
            tables = model.rotary.tables(coords_N2, grids_N2)
            rotary = [
                F.pad(t, (0, 0, rows, 0), value=v) for t, v in zip(tables, (1, 0), strict=True)
            ]
        for block in model.blocks:
            assert isinstance(block, Block)
            x_BNC = x_BNC + block.ls1(attended(block.attn, block.norm1(x_BNC), rotary))
            x_BNC = x_BNC + block.ls2(block.mlp(block.norm2(x_BNC)))
        pooled_BC = model.fc_norm(self._pool(model.norm(x_BNC)))
        if model.pooler is not None:
            pooled_BC = torch.tanh(model.pooler(pooled_BC))
        logits: Tensor = model.head(pooled_BC)
        return (logits, pooled_BC) if self.embeddings else logits

    def _with_tokens(self, x_BNC: Tensor) -> Tensor:
        embeds, batch = self.model.embeds, x_BNC.shape[0]
        tokens = [t for t in (embeds.cls_token, embeds.reg_token) if t is not None]
        x_BNC = torch.cat([*(token.expand(batch, -1, -1) for token in tokens), x_BNC], dim=1)
        embedded: Tensor = embeds.norm_pre(x_BNC)
        return embedded

    def _pool(self, x_BNC: Tensor) -> Tensor:
        if self.model.pool == "cls":
            return x_BNC[:, 0]
        x_BNC = x_BNC[:, self.model.prefix_tokens :]
        pool = self.model.attn_pool
        return x_BNC.mean(dim=1) if pool is None else pooled_by_attention(pool, x_BNC)[:, 0]


def embedded_patches(model: NaViT, patches: Tensor, coords_N2: Tensor, grids_N2: Tensor) -> Tensor:
    """Return the tokens [..., N, C] of normalised patches [..., N, p * p * channels]."""
    embeds = model.embeds
    tokens: Tensor = embeds.proj(patches)
    kind = POSITIONS[embeds.position]
    names = list(kind.tables(embeds.grid))
    if not names:
        return tokens
    tables = torch.cat([getattr(embeds, name).flatten(0, -2) for name in names])
    return tokens + kind.weights(coords_N2, grids_N2, embeds.grid) @ tables


def _places(h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (y, x) of each patch, and (h, w) in every row."""
    y_HW = torch.arange(h, device=device)[:, None].expand(h, w)
    x_HW = torch.arange(w, device=device)[None].expand(h, w)
    coords_N2 = torch.stack([y_HW.reshape(-1), x_HW.reshape(-1)], dim=1)
    grid_N2 = [torch.full_like(coords_N2[:, :1], side) for side in (h, w)]
    return coords_N2, torch.cat(grid_N2, dim=1)


def attended(
    attention: Attention,
    x_BNC: Tensor,
    rotary: list[Tensor] | None,
    mask_NN: Tensor | None = None,
) -> Tensor:
    """Return the outputs [B, N, C] of self-attention; None: every token attends to all others."""
    batch, count, _ = x_BNC.shape
    qkv = attention.projected(x_BNC).reshape(batch, count, 3, attention.heads, attention.dim_head)
    q, k, v = qkv.unbind(2)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if rotary is not None:
        q, k = _turned(q, rotary), _turned(k, rotary)
    q_BHND, k_BHND, v_BHND = (each.transpose(1, 2) for each in (q, k, v))
    out = F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=mask_NN)
    projected: Tensor = attention.proj(out.transpose(1, 2).reshape(batch, count, -1))
    return projected


def _turned(x_BNHD: Tensor, rotary: list[Tensor]) -> Tensor:
    cosines, sines = (table[None, :, None] for table in rotary)
    first, second = x_BNHD.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)


def pooled_by_attention(
    pool: AttentionPool, x_BNC: Tensor, count: int = 1, mask_QN: Tensor | None = None
) -> Tensor:
    """Return [B, Q, C]: the learned query, Q times, over the tokens of its row of the mask."""
    batch, tokens, _ = x_BNC.shape
    q = pool.q(pool.latent).reshape(1, 1, pool.heads, pool.dim_head).expand(batch, count, -1, -1)
    k, v = pool.kv(x_BNC).reshape(batch, tokens, 2, pool.heads, pool.dim_head).unbind(2)
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_QN)
    x_BQC = pool.proj(out.transpose(1, 2).reshape(batch, count, -1))
    pooled: Tensor = x_BQC + pool.mlp(pool.norm(x_BQC))
    return pooled
