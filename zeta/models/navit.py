"""NaViT: a Vision Transformer for images of any size and aspect ratio (Dehghani et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor, nn

from zeta.config_field import check_choice, check_whole
from zeta.models.arguments import (
    check_layer_scale,
    check_rates,
    check_sizes,
    depth_rates,
    head_width,
    is_finite,
    table_grid,
)
from zeta.models.attention import BACKENDS, Segments
from zeta.models.dropout import Dropout
from zeta.models.layers import (
    ACTIVATIONS,
    QKV_BIASES,
    AttentionPool,
    Block,
    BlockShape,
    first_tokens,
    mean_pool,
    put_prefix,
)
from zeta.models.linear import Linear
from zeta.models.packed_tokens import PackedTokens
from zeta.models.packed_vit import PackedViT
from zeta.models.parameters import INPUT_MATRIX, LEARNED_TOKEN, Rules, biased_in_timm
from zeta.models.patchify import DropRate, Images
from zeta.models.position import (
    GRID_TABLE,
    LINE_TABLE,
    POSITIONS,
    check_absolute,
    table_of,
)
from zeta.models.rotary import rotary
from zeta.packed import PackedBatch

POOLS = ("attention", "mean", "cls")


class PatchPositionEmbedding(nn.Module):
    """Linear patch embedding plus position embedding (names as in timm's NaFlexVit)."""

    parameter_rules: ClassVar[Rules] = {
        "proj.weight": biased_in_timm(INPUT_MATRIX),
        "cls_token": LEARNED_TOKEN,
        "reg_token": LEARNED_TOKEN,
        "pos_embed": GRID_TABLE,
        "pos_embed_y": LINE_TABLE,
        "pos_embed_x": LINE_TABLE,
    }

    def __init__(
        self,
        patch_dim: int,
        dim: int,
        grid: tuple[int, int],
        position: str,
        dropout: float,
        registers: int,
        *,
        class_token: bool,
        bias: bool,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.position, self.grid = position, grid
        self.proj = Linear(patch_dim, dim, bias=bias)
        for name, rows in POSITIONS[position].tables(grid).items():
            self.register_parameter(name, nn.Parameter(torch.empty(1, *rows, dim)))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, registers, dim)) if registers else None
        self.drop = Dropout(dropout)
        self.norm_pre = norm or nn.Identity()

    def forward(
        self,
        patches_TP: Tensor,
        coords_T2: Tensor,
        grids_T2: Tensor,
        prefix_rows: Tensor | None,
        segments: Segments,
    ) -> Tensor:
        """Map normalised patches [T, p*p*c] to tokens [T, C], learned ones in `prefix_rows`."""
        kind = POSITIONS[self.position]
        weights = kind.weights(coords_T2, grids_T2, self.grid)
        parts = [getattr(self, name).flatten(0, -2) for name in kind.tables(self.grid)]
        tokens_TC: Tensor = self.proj(patches_TP)
        if parts:
            tables = parts[0] if len(parts) == 1 else torch.cat(parts)
            with torch.autocast(patches_TP.device.type, enabled=False):
                position_TC = weights.to(tables.dtype) @ tables
            tokens_TC = tokens_TC + position_TC
        learned: list[Tensor] = [
            token for token in (self.cls_token, self.reg_token) if token is not None
        ]
        prefix = torch.cat(learned, dim=1) if learned else None
        tokens_TC = put_prefix(tokens_TC, prefix, prefix_rows)
        embedded: Tensor = self.norm_pre(self.drop(tokens_TC, segments))
        return embedded


class NaViT(PackedViT):
    """Vision Transformer over packed images of any size.

    Args:
        image_size: pixels of a side, or (height, width): the size of the position tables. With
            fractional positions images may be larger or smaller.
        patch_size: pixels of a patch's side.
        num_classes: outputs of the head.
        dim: channels of a token.
        depth: number of transformer blocks.
        heads: attention heads.
        mlp_dim: hidden channels of the MLPs.
        channels: channels of an image.
        dim_head: channels of a head; None: dim / heads.
        dropout: rate after the attention projection and in the MLPs, in training. (Attention
            weights are never dropped: fused kernels have no such option.)
        emb_dropout: dropout rate of the embedded tokens, in training.
        token_dropout_prob: share of each image's patches to leave out in training: a rate, or a
            function of (height, width) in pixels. Acts on lists of images; a `PackedBatch` comes
            already dropped.
        return_embeddings: return pooled embeddings [I, C] instead of logits.
        position: coordinates of the position tables, see `zeta.models.position`; rope: queries and
            keys are rotated, without a table; rope+fractional and so on: both.
        pool: attention (a learned query reads each image), mean (of its patches) or cls (a learned
            class token).
        registers: learned tokens added to every image, left out of the pooling (Darcet 2024).
        layer_scale: initial layer scale; None: none.
        stochastic_depth: share of images that skip the last block's branches, in training;
            earlier blocks less, linearly.
        qk_norm: normalise queries and keys, which keeps training stable at scale.
        bias: biases on norms, projections and the patch embedding, as most published ViTs have
            them. One on the keys makes training depend on the order of sums, see
            `zeta.models.layers`.
        activation: activation of the MLPs: gelu, gelu_tanh (its approximation, as in SigLIP),
            quick_gelu (as in CLIP) or silu.
        qkv_bias: which of queries, keys and values have a bias: none, qv or all; None: as `bias`.
        norm_eps: what the norms add to the variance.
        pre_norm: normalise the tokens before the first block, as in CLIP; the patch embedding then
            has no bias.
        gated_mlp: let an activated projection multiply a second one in the blocks' MLPs: with silu
            it is SwiGLU. Its matrices are one half larger at the same `mlp_dim`.
        mlp_norm: normalise the hidden channels of the blocks' MLPs, as in EVA-02.
        norm_after_pool: normalise the pooled vector, instead of the tokens after the last block.
        pooler: put a linear layer and a tanh after the pooling, as in transformers' ViTModel.
        rope_base, rope_coordinates, rope_grid, rope_shift, rope_jitter, rope_rescale: of rotary
            positions, see `zeta.models.rotary.Rotary`; None: its defaults, those of DINOv3.
        mean, std: per channel or one for all, of pixels in [0, 1]; uint8 input is normalised with
            them.
        attention: back-end, see `zeta.models.attention`.
        seed: of the initial weights.

    Raises:
        ValueError: an argument out of range, by name.
    """

    embeds: PatchPositionEmbedding

    arch = "navit"

    def __init__(
        self,
        image_size: int | Sequence[int],
        patch_size: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        channels: int = 3,
        dim_head: int | None = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        token_dropout_prob: DropRate | None = None,
        return_embeddings: bool = False,
        *,
        position: str = "fractional",
        pool: str = "attention",
        registers: int = 0,
        layer_scale: float | None = None,
        stochastic_depth: float = 0.0,
        qk_norm: bool = True,
        bias: bool = False,
        activation: str = "gelu",
        qkv_bias: str | None = None,
        norm_eps: float = 1e-6,
        pre_norm: bool = False,
        gated_mlp: bool = False,
        mlp_norm: bool = False,
        norm_after_pool: bool = False,
        pooler: bool = False,
        rope_base: float | None = None,
        rope_coordinates: str | None = None,
        rope_grid: Sequence[int] | None = None,
        rope_shift: float | None = None,
        rope_jitter: float | None = None,
        rope_rescale: float | None = None,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        attention: str = "auto",
        seed: int = 0,
    ) -> None:
        check_sizes(patch_size=patch_size, num_classes=num_classes, dim=dim, depth=depth)
        check_sizes(heads=heads, mlp_dim=mlp_dim, channels=channels)
        check_whole("registers", registers, 0)
        check_rates(dropout=dropout, emb_dropout=emb_dropout, stochastic_depth=stochastic_depth)
        if token_dropout_prob is not None and not callable(token_dropout_prob):
            check_rates(token_dropout_prob=token_dropout_prob)
        check_choice("position", position, POSITIONS)
        check_layer_scale(layer_scale)
        check_choice("pool", pool, POOLS)
        check_choice("activation", activation, ACTIVATIONS)
        if qkv_bias is not None:
            check_choice("qkv_bias", qkv_bias, QKV_BIASES)
        if not is_finite(norm_eps) or norm_eps <= 0:
            raise ValueError(f"norm_eps is {norm_eps!r}: give a small positive number, as in 1e-6")
        check_choice("attention", attention, BACKENDS)
        dim_head = head_width(dim, heads, dim_head)
        class_token = pool == "cls"
        prefix_tokens = class_token + registers
        super().__init__(patch_size, channels, mean, std, prefix_tokens, token_dropout_prob)
        self.return_embeddings, self.pool = return_embeddings, pool
        self.rotary = rotary(
            position,
            dim_head,
            is_rotary=POSITIONS[position].rotary,
            base=rope_base,
            coordinates=rope_coordinates,
            grid=rope_grid,
            shift=rope_shift,
            jitter=rope_jitter,
            rescale=rope_rescale,
        )
        grid = table_grid(image_size, patch_size)
        shape = BlockShape(
            dim=dim,
            heads=heads,
            dim_head=dim_head,
            mlp_dim=mlp_dim,
            dropout=dropout,
            layer_scale=layer_scale,
            qk_norm=qk_norm,
            bias=bias,
            qkv_bias=qkv_bias,
            norm_eps=norm_eps,
            activation=activation,
            gated_mlp=gated_mlp,
            mlp_norm=mlp_norm,
            backend=attention,
        )
        self.embeds = PatchPositionEmbedding(
            patch_size * patch_size * channels,
            dim,
            grid,
            position,
            emb_dropout,
            registers,
            class_token=class_token,
            bias=bias and not pre_norm,
            norm=shape.norm() if pre_norm else None,
        )
        self.blocks = nn.ModuleList(Block(shape, r) for r in depth_rates(stochastic_depth, depth))
        self.norm = nn.Identity() if norm_after_pool else shape.norm()
        self.attn_pool = AttentionPool(shape) if pool == "attention" else None
        self.fc_norm = shape.norm() if norm_after_pool else nn.Identity()
        self.pooler = Linear(dim, dim) if pooler else None
        self.head = Linear(dim, num_classes)
        self.init_weights(seed)

    def forward(self, images: PackedBatch | Images) -> Tensor:
        """Return logits [I, num_classes], or embeddings [I, dim] with `return_embeddings`.

        Args:
            images: tensors [channels, height, width] with sides that are multiples of
                `patch_size`, in a list or nested lists (results in reading order); or a pack, whose
                unused rows give finite values without a meaning. uint8 is normalised here, float
                is taken as normalised.

        Raises:
            ValueError: images that the model cannot take, by number and reason.
        """
        embeddings = self.forward_embeddings(images)
        if self.return_embeddings:
            return embeddings
        logits: Tensor = self.head(embeddings)
        return logits

    def _pooled(self, x_TC: Tensor, packed: PackedTokens) -> Tensor:
        pooled_IC: Tensor = self.fc_norm(self._pool(x_TC, packed))
        return pooled_IC if self.pooler is None else torch.tanh(self.pooler(pooled_IC))

    def _pool(self, x_TC: Tensor, packed: PackedTokens) -> Tensor:
        segments = packed.segments
        if self.pool == "cls":
            return first_tokens(x_TC, segments)
        if self.prefix_tokens:
            *lengths, tail = segments.lengths
            patches = [max(0, length - self.prefix_tokens) for length in lengths]
            segments = Segments.from_lengths(patches, x_TC.device, tail)
            before = accumulate(self.prefix_tokens if length else 0 for length in (*lengths, 0))
            skipped_S = torch.tensor(list(before)).to(x_TC.device, non_blocking=True)
            x_TC = x_TC[
                torch.arange(segments.num_tokens, device=x_TC.device) + skipped_S[segments.index_T]
            ]
        if self.attn_pool is None:
            return mean_pool(x_TC, segments)
        pooled: Tensor = self.attn_pool(x_TC, segments)
        return pooled

    @property
    def largest_grid(self) -> tuple[int, int] | None:
        """The size of absolute tables; None: positions are relative."""
        return self.embeds.grid if table_of(self.embeds.position) == "absolute" else None

    def check_grids(self, grids: Sequence[tuple[int, int]]) -> None:
        """Raise ValueError for an image that is too large for absolute tables."""
        if table_of(self.embeds.position) == "absolute":
            check_absolute(grids, self.embeds.grid)

    def grids_fit(self, pack: PackedBatch) -> Tensor | None:
        """Return whether all images of a pack fit absolute tables; None: positions are relative."""
        if table_of(self.embeds.position) != "absolute":
            return None
        return (pack.grids <= torch.tensor(self.embeds.grid, device=pack.grids.device)).all()
