"""Layers of the packed transformer, named and laid out as in timm.

Letters in shape suffixes: T tokens, S segments (images, then tail padding), I images, C channels
of a token, H heads, D channels of a head. By default norms and projections have no bias: the true
gradient of a bias on the keys is zero, and Adam would amplify its rounding noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from zeta.models.attention import Segments, attend, rotated
from zeta.models.dropout import Dropout, Skip, StochasticDepth, by_layer
from zeta.models.linear import Linear
from zeta.models.parameters import (
    INPUT_MATRIX,
    MATRIX,
    ONES,
    ZEROS,
    Rules,
    biased_in_timm,
    constant,
    matrix,
    normal,
)
from zeta.models.skipping import Branch, plan_skips

_CHECKPOINTING, _STREAM = "activation_checkpointing", "stream_dtype"
"""Attributes of every encoder: whether it recomputes its blocks, and the dtype between them."""
_PROJECTION, _HIDDEN, _MLP = range(3)
"""Places in a block that draw at random: after attention, inside of the MLP, and after it."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
}
"""Activations of the MLPs by name: `gelu_tanh` as in SigLIP, `quick_gelu` as in CLIP."""
QKV_BIASES = ("none", "qv", "all")
"""Which of queries, keys and values have a bias: `qv` as in DINOv3 and EVA-02."""


class Norm(nn.LayerNorm):
    """Layer normalisation with a weight, and a bias only on request."""

    parameter_rules: ClassVar[Rules] = {"weight": biased_in_timm(ONES), "bias": ZEROS}

    def __init__(self, dim: int, *, bias: bool = False, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of `x`, computing in fp32."""
        if x.device.type == "cpu" and x.dtype == torch.bfloat16:
            # The CPU kernel reads bf16 and computes in fp32; autocast would make fp32 copies.
            with torch.autocast("cpu", enabled=False):
                return super().forward(x)
        return super().forward(x)


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch's output (Touvron et al. 2021)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.empty(dim))

    @property
    def parameter_rules(self) -> Rules:
        """Rules of the parameters, see `zeta.models.parameters`."""
        return {"gamma": constant(self.initial)}

    def forward(self, x_TC: Tensor) -> Tensor:
        """Scale tokens [T, C]."""
        return x_TC * self.gamma.to(x_TC.dtype)


@dataclass(frozen=True)
class BlockShape:
    """Sizes and options that all blocks of a model share."""

    dim: int
    heads: int
    dim_head: int
    mlp_dim: int
    dropout: float = 0.0
    layer_scale: float | None = None
    """Initial factor of the layer scale; None: no layer scale."""
    qk_norm: bool = True
    bias: bool = False
    """Whether norms and projections have biases, as in most published ViTs."""
    qkv_bias: str | None = None
    """Which of queries, keys and values have a bias, one of `QKV_BIASES`; None: as `bias` says."""
    norm_eps: float = 1e-6
    """What the norms add to the variance."""
    activation: str = "gelu"
    """Activation of the MLPs: one of `ACTIVATIONS`."""
    gated_mlp: bool = False
    """Whether the blocks' MLPs multiply an activated projection with a second one (SwiGLU)."""
    mlp_norm: bool = False
    """Whether the blocks' MLPs normalise their hidden channels."""
    backend: str = "auto"
    """Attention back-end, see `zeta.models.attention`."""

    def scale(self) -> nn.Module:
        """Build the layer scale of one branch."""
        return nn.Identity() if self.layer_scale is None else LayerScale(self.dim, self.layer_scale)

    def head_norm(self) -> nn.Module:
        """Build the norm of the queries or the keys of every head."""
        return self.norm(self.dim_head) if self.qk_norm else nn.Identity()

    def norm(self, dim: int | None = None) -> Norm:
        """Build a norm of tokens, or of `dim` channels."""
        return Norm(dim or self.dim, bias=self.bias, eps=self.norm_eps)


class Attention(nn.Module):
    """Self-attention within segments, with normalised queries and keys (ViT-22B, section 2)."""

    parameter_rules: ClassVar[Rules] = {
        "qkv.weight": matrix(stacked=3),
        "q_bias": ZEROS,
        "v_bias": ZEROS,
    }

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.heads, self.dim_head, self.backend = shape.heads, shape.dim_head, shape.backend
        inner = shape.heads * shape.dim_head
        biases = shape.qkv_bias or ("all" if shape.bias else "none")
        self.qkv = Linear(shape.dim, 3 * inner, bias=biases == "all")
        self.q_bias = nn.Parameter(torch.empty(inner)) if biases == "qv" else None
        self.v_bias = nn.Parameter(torch.empty(inner)) if biases == "qv" else None
        self.q_norm = shape.head_norm()
        self.k_norm = shape.head_norm()
        self.proj = Linear(inner, shape.dim, bias=shape.bias)
        self.proj_drop = Dropout(shape.dropout)

    def forward(self, x_TC: Tensor, segments: Segments) -> Tensor:
        """Map tokens [T, C] to [T, C]."""
        qkv_T3 = self.projected(x_TC)
        q_THD, k_THD, v_THD = qkv_T3.view(-1, 3, self.heads, self.dim_head).unbind(1)
        q_THD = rotated(self.q_norm(q_THD), segments)
        k_THD = rotated(self.k_norm(k_THD), segments)
        out_THD = attend(q_THD, k_THD, v_THD, segments, self.backend)
        projected: Tensor = self.proj_drop(self.proj(out_THD.flatten(-2)), segments, _PROJECTION)
        return projected

    def projected(self, x_TC: Tensor) -> Tensor:
        """Return queries, keys and values of tokens [..., C], side by side."""
        qkv: Tensor = self.qkv(x_TC)
        if self.q_bias is None or self.v_bias is None:
            return qkv
        biases = [self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]
        return qkv + torch.cat(biases).to(qkv.dtype)


class Mlp(nn.Module):
    """Two linear layers with an activation in between.

    Gated, the first layer makes two hidden vectors, and the activated one multiplies the other
    (Shazeer 2020); both are one matrix, the gate first. With a norm, the hidden channels are
    normalised before the second layer (EVA-02). Names are timm's.

    Args:
        shape: sizes and options of the block.
        dropout: rate, in training.
        plain: neither gated nor with a norm, whatever `shape` says.
    """

    def __init__(self, shape: BlockShape, dropout: float = 0.0, *, plain: bool = False) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[shape.activation]
        self.gated = shape.gated_mlp and not plain
        parts = 2 if self.gated else 1
        self.parameter_rules: Rules = {"fc1.weight": matrix(stacked=parts)}
        self.fc1 = Linear(shape.dim, parts * shape.mlp_dim, bias=shape.bias)
        has_norm = shape.mlp_norm and not plain
        self.norm = shape.norm(shape.mlp_dim) if has_norm else nn.Identity()
        self.fc2 = Linear(shape.mlp_dim, shape.dim, bias=shape.bias)
        self.drop = Dropout(dropout)

    def forward(self, x_TC: Tensor, segments: Segments | None = None) -> Tensor:
        """Map tokens [T, C] to [T, C]; only dropout needs their segments."""
        hidden_TC = self.fc1(x_TC)
        if self.gated:
            gate_TC, hidden_TC = hidden_TC.chunk(2, dim=-1)
            hidden_TC = self.activation(gate_TC) * hidden_TC
        else:
            hidden_TC = self.activation(hidden_TC)
        hidden_TC = self.norm(self.drop(hidden_TC, segments, _HIDDEN))
        out_TC: Tensor = self.drop(self.fc2(hidden_TC), segments, _MLP)
        return out_TC


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to the residual stream."""

    branches: ClassVar[tuple[int, ...]] = (_PROJECTION, _MLP)
    """Sites of the branches that images may skip."""

    def __init__(self, shape: BlockShape, stochastic_depth: float = 0.0) -> None:
        super().__init__()
        self.norm1 = shape.norm()
        self.attn = Attention(shape)
        self.ls1 = shape.scale()
        self.norm2 = shape.norm()
        self.mlp = Mlp(shape, shape.dropout)
        self.ls2 = shape.scale()
        self.drop_path = StochasticDepth(stochastic_depth)

    def forward(
        self, x_TC: Tensor, segments: Segments, skips: Mapping[int, Skip] | None = None
    ) -> Tensor:
        """Map tokens [T, C] to [T, C]; `skips`: the images that skip a branch, by its site."""
        skips = skips or {}
        x_TC = self.drop_path(x_TC, self._attended, segments, skips.get(_PROJECTION))
        out_TC: Tensor = self.drop_path(x_TC, self._transformed, segments, skips.get(_MLP))
        return out_TC

    def _attended(self, x_TC: Tensor, segments: Segments) -> Tensor:
        attended: Tensor = self.ls1(self.attn(self.norm1(x_TC), segments))
        return attended

    def _transformed(self, x_TC: Tensor, segments: Segments) -> Tensor:
        transformed: Tensor = self.ls2(self.mlp(self.norm2(x_TC), segments))
        return transformed


class ParallelBlock(nn.Module):
    """Attention and MLP side by side on one norm, fused into one input projection (ViT-22B).

    y = LN(x); x + Attention(y) + MLP(y): one matrix product less in sequence, about 15% faster at
    scale. Only the MLP has a bias. Names are those of timm's `ParallelScalingBlock`.
    """

    branches: ClassVar[tuple[int, ...]] = (_PROJECTION,)
    """Site of the branch that images may skip."""

    def __init__(self, shape: BlockShape, stochastic_depth: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dim_head, self.backend = shape.heads, shape.dim_head, shape.backend
        inner = shape.heads * shape.dim_head
        self.split = [shape.mlp_dim, 3 * inner]
        self.parameter_rules: Rules = {
            "in_proj.weight": replace(INPUT_MATRIX, parts=(shape.mlp_dim, inner, inner, inner)),
            "mlp_bias": ZEROS,
            "attn_out_proj.weight": biased_in_timm(MATRIX),
        }
        self.in_norm = Norm(shape.dim)
        self.in_proj = Linear(shape.dim, sum(self.split), bias=False)
        self.mlp_bias = nn.Parameter(torch.empty(shape.mlp_dim))
        self.q_norm = shape.head_norm()
        self.k_norm = shape.head_norm()
        self.attn_out_proj = Linear(inner, shape.dim, bias=False)
        self.mlp_out_proj = Linear(shape.mlp_dim, shape.dim)
        self.mlp_drop = Dropout(shape.dropout)
        self.proj_drop = Dropout(shape.dropout)
        self.ls = shape.scale()
        self.drop_path = StochasticDepth(stochastic_depth)

    def forward(
        self, x_TC: Tensor, segments: Segments, skips: Mapping[int, Skip] | None = None
    ) -> Tensor:
        """Map tokens [T, C] to [T, C]; `skips`: the images that skip the branch, by its site."""
        skip = (skips or {}).get(_PROJECTION)
        out_TC: Tensor = self.drop_path(x_TC, self._both, segments, skip)
        return out_TC

    def _both(self, x_TC: Tensor, segments: Segments) -> Tensor:
        hidden, qkv = torch.split(self.in_proj(self.in_norm(x_TC)), self.split, dim=-1)
        q_THD, k_THD, v_THD = qkv.reshape(-1, 3, self.heads, self.dim_head).unbind(1)
        q_THD = rotated(self.q_norm(q_THD), segments)
        k_THD = rotated(self.k_norm(k_THD), segments)
        out_THD = attend(q_THD, k_THD, v_THD, segments, self.backend)
        hidden = F.gelu(hidden + self.mlp_bias.to(hidden.dtype))
        hidden = self.mlp_drop(hidden, segments, _HIDDEN)
        both = self.attn_out_proj(out_THD.flatten(-2)) + self.mlp_out_proj(hidden)
        scaled: Tensor = self.ls(self.proj_drop(both, segments, _PROJECTION))
        return scaled


def run_blocks(
    blocks: nn.ModuleList,
    x_TC: Tensor,
    segments: Segments,
    *,
    recompute: bool,
    host_seeds: Sequence[int] = (),
) -> Tensor:
    """Map tokens [T, C] through transformer blocks.

    Args:
        blocks: modules like `Block`.
        x_TC: tokens.
        segments: their images.
        recompute: store no activations.
        host_seeds: seeds of the images' draws, on the host: a branch is then run without the images
            that skip it. Empty: it is run on all images, and they are zeroed.
    """
    layers = list(by_layer(segments, len(blocks)))
    plans = plan_skips(branches_of(blocks), layers, host_seeds)
    for block, own, skips in zip(blocks, layers, plans, strict=True):
        if recompute and torch.is_grad_enabled():
            # Draws are hashes of seeds that the segments carry: no generator to wind back.
            x_TC = checkpoint(
                block, x_TC, own, skips, use_reentrant=False, preserve_rng_state=False
            )
        else:
            x_TC = block(x_TC, own, skips)
    return x_TC


def branches_of(blocks: nn.ModuleList) -> list[Branch]:
    """Return the branches that images may skip: in training alone."""
    return [
        Branch(number, site, block.drop_path.rate)
        for number, block in enumerate(blocks)
        if isinstance(block, Block | ParallelBlock)
        if block.training and block.drop_path.rate > 0
        for site in block.branches
    ]


def set_checkpointing(model: nn.Module, on: bool) -> None:
    """Let the encoders of `model` recompute their blocks in the backward pass, or not."""
    for module in model.modules():
        if hasattr(module, _CHECKPOINTING):
            setattr(module, _CHECKPOINTING, on)


def set_stream(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Set the dtype of the residual stream in the encoders of `model`; None: the weights' dtype."""
    for module in model.modules():
        if hasattr(module, _STREAM):
            setattr(module, _STREAM, dtype)


class AttentionPool(nn.Module):
    """Attention of one learned query over each image's tokens (Lee et al. 2019; NaViT, 2.1)."""

    parameter_rules: ClassVar[Rules] = {
        "latent": normal(lambda shape: shape[-1] ** -0.5),
        "kv.weight": biased_in_timm(matrix(stacked=2)),
        "q.weight": biased_in_timm(MATRIX),
        "proj.weight": biased_in_timm(MATRIX),
        "mlp.fc1.weight": biased_in_timm(MATRIX),
        "mlp.fc2.weight": biased_in_timm(MATRIX),
    }

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.heads, self.dim_head, self.backend = shape.heads, shape.dim_head, shape.backend
        dim, inner = shape.dim, shape.heads * shape.dim_head
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = Linear(dim, inner, bias=shape.bias)
        self.kv = Linear(dim, 2 * inner, bias=shape.bias)
        self.proj = Linear(inner, dim, bias=shape.bias)
        self.norm = shape.norm()
        self.mlp = Mlp(shape, plain=True)

    def forward(self, x_TC: Tensor, segments: Segments) -> Tensor:
        """Pool tokens [T, C] to one vector an image [I, C]; an empty image gives zeros."""
        q_1HD = self.q(self.latent[0]).view(1, self.heads, self.dim_head)
        q_SHD = q_1HD.expand(len(segments.lengths), -1, -1)
        k_THD, v_THD = self.kv(x_TC).view(-1, 2, self.heads, self.dim_head).unbind(1)
        out_SHD = attend(q_SHD, k_THD, v_THD, segments, self.backend, queries_per_segment=1)
        x_IC = self.proj(out_SHD[:-1].flatten(-2))
        pooled: Tensor = x_IC + self.mlp(self.norm(x_IC))
        return pooled


def mean_pool(x_TC: Tensor, segments: Segments) -> Tensor:
    """Average the tokens [T, C] of each image to [I, C]; an empty image gives zeros."""
    sums_SC = x_TC.new_zeros(len(segments.lengths), x_TC.shape[1], dtype=torch.float32)
    sums_SC = sums_SC.index_add(0, segments.index_T, x_TC.float())
    counts_S = segments.cu_seqlens.diff().clamp(min=1)
    return (sums_SC / counts_S[:, None])[:-1].to(x_TC.dtype)


def first_tokens(x_TC: Tensor, segments: Segments) -> Tensor:
    """Return the first token of each image, [I, C]: its class token.

    Unused images have no rows: they get row 0, and have no weight in the loss.
    """
    empty = segments.cu_seqlens.diff()[:-1] == 0
    return x_TC[segments.cu_seqlens[:-2].long().masked_fill(empty, 0)]


def put_prefix(x_TC: Tensor, token_1RC: Tensor | None, rows: Tensor | None) -> Tensor:
    """Replace the rows of prefix tokens (R an image, image by image) by the learned tokens."""
    if token_1RC is None or rows is None:
        return x_TC
    images = len(rows) // token_1RC.shape[1]
    return x_TC.index_copy(0, rows, token_1RC[0].to(x_TC.dtype).repeat(images, 1))


class LogitScale(nn.Module):
    """The learned temperature, and bias, of the similarities of images and texts.

    Args:
        scale: initial factor on the cosines; its logarithm is learned.
        bias: initial bias; None: no bias.
        limit: largest value of the factor.
    """

    def __init__(self, scale: float, bias: float | None, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.parameter_rules: Rules = {
            "log_scale": constant(math.log(scale)),
            "logit_bias": constant(bias or 0.0),
        }
        self.log_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = None if bias is None else nn.Parameter(torch.empty(1))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return scale and bias, float32 scalars; the limit does not stop the scale's gradient."""
        scale = self.log_scale.float().exp()[0]
        scale = scale + (scale.clamp(max=self.limit) - scale).detach()
        bias = torch.zeros_like(scale) if self.logit_bias is None else self.logit_bias.float().sum()
        return scale, bias
