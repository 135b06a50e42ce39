"""Layers of the packed transformer, named and laid out as in timm.

Letters in shape suffixes: T tokens, I images, C channels of a token, H heads, D channels of a
head. No layer here has a bias, in line with ViT-22B and NaViT; a bias on the keys would
have a true gradient of zero, and Adam would amplify its rounding noise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zeta.attention import Segments, attend


class Norm(nn.LayerNorm):
    """Layer normalisation with a weight and no bias; eps 1e-6."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6, bias=False)


class Attention(nn.Module):
    """Self-attention within segments, with normalised queries and keys (ViT-22B, section 2)."""

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float, backend: str) -> None:
        super().__init__()
        self.heads, self.dim_head, self.backend = heads, dim_head, backend
        self.qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.q_norm = Norm(dim_head)
        self.k_norm = Norm(dim_head)
        self.proj = nn.Linear(heads * dim_head, dim, bias=False)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x_TC: Tensor, segments: Segments) -> Tensor:
        """Map tokens [T, C] to [T, C]."""
        qkv = self.qkv(x_TC).unflatten(-1, (3, self.heads, self.dim_head))
        q_THD, k_THD, v_THD = qkv.unbind(1)
        out_THD = attend(self.q_norm(q_THD), self.k_norm(k_THD), v_THD, segments, self.backend)
        return self._project(out_THD)

    def _project(self, out_THD: Tensor) -> Tensor:
        projected: Tensor = self.proj_drop(self.proj(out_THD.flatten(-2)))
        return projected


class Mlp(nn.Module):
    """Two linear layers with an exact GELU in between."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=False)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_TC: Tensor) -> Tensor:
        """Map tokens [T, C] to [T, C]."""
        out: Tensor = self.drop(self.fc2(self.drop(F.gelu(self.fc1(x_TC)))))
        return out


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to the residual stream."""

    def __init__(
        self, dim: int, heads: int, dim_head: int, mlp_dim: int, dropout: float, backend: str
    ) -> None:
        super().__init__()
        self.norm1 = Norm(dim)
        self.attn = Attention(dim, heads, dim_head, dropout, backend)
        self.norm2 = Norm(dim)
        self.mlp = Mlp(dim, mlp_dim, dropout)

    def forward(self, x_TC: Tensor, segments: Segments) -> Tensor:
        """Map tokens [T, C] to [T, C]."""
        x_TC = x_TC + self.attn(self.norm1(x_TC), segments)
        out_TC: Tensor = x_TC + self.mlp(self.norm2(x_TC))
        return out_TC


class AttentionPool(nn.Module):
    """One learned query per model reads each image's tokens (Lee et al. 2019; NaViT, 2.1)."""

    def __init__(self, dim: int, heads: int, dim_head: int, mlp_dim: int, backend: str) -> None:
        super().__init__()
        self.heads, self.dim_head, self.backend = heads, dim_head, backend
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = nn.Linear(dim, heads * dim_head, bias=False)
        self.kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.proj = nn.Linear(heads * dim_head, dim, bias=False)
        self.norm = Norm(dim)
        self.mlp = Mlp(dim, mlp_dim)

    def forward(self, x_TC: Tensor, segments: Segments) -> Tensor:
        """Pool tokens [T, C] to one vector an image [I, C]; an empty image gives zeros."""
        q_1HD = self.q(self.latent[0]).unflatten(-1, (self.heads, self.dim_head))
        q_SHD = q_1HD.expand(len(segments.lengths), -1, -1)
        k_THD, v_THD = self.kv(x_TC).unflatten(-1, (2, self.heads, self.dim_head)).unbind(1)
        out_SHD = attend(q_SHD, k_THD, v_THD, segments, self.backend, queries_per_segment=1)
        x_IC = self.proj(out_SHD[:-1].flatten(-2))
        pooled: Tensor = x_IC + self.mlp(self.norm(x_IC))
        return pooled
