"""MegaVit: a Vision Transformer at one resolution, with the options of ViT-22B for scale.

Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters": attention and MLP in
parallel, normalised queries and keys, no bias on their projections nor on norms. It runs on the
same packed sequences as NaViT, so that it trains in the same loop: `data.resolution.kind=fixed`,
`data.resolution.max` = image_size, `data.resolution.fit` = crop or squash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from zeta.config_field import check_choice
from zeta.models.arguments import (
    check_layer_scale,
    check_rates,
    check_sizes,
    depth_rates,
    head_width,
    table_grid,
)
from zeta.models.attention import BACKENDS, Segments
from zeta.models.dropout import Dropout
from zeta.models.layers import (
    Block,
    BlockShape,
    Norm,
    ParallelBlock,
    first_tokens,
    mean_pool,
    put_prefix,
)
from zeta.models.linear import Linear
from zeta.models.packed_tokens import PackedTokens
from zeta.models.packed_vit import PackedViT
from zeta.models.parameters import INPUT_MATRIX, LEARNED_TOKEN, Rules
from zeta.models.patchify import Images
from zeta.models.position import GRID_TABLE
from zeta.models.rotary import rotary
from zeta.packed import PackedBatch

POSITIONS = ("table", "rope", "rope+table")


class FixedPatchEmbedding(nn.Module):
    """Linear patch embedding plus one learned position for each patch of the grid, or none."""

    parameter_rules: ClassVar[Rules] = {
        "proj.weight": INPUT_MATRIX,
        "cls_token": LEARNED_TOKEN,
        "pos_embed": GRID_TABLE,
    }

    def __init__(
        self,
        patch_dim: int,
        dim: int,
        grid: tuple[int, int],
        class_token: bool,
        dropout: float,
        *,
        table: bool,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.proj = Linear(patch_dim, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, *grid, dim)) if table else None
        self.drop = Dropout(dropout)

    def forward(
        self,
        patches_TP: Tensor,
        coords_T2: Tensor,
        grids_T2: Tensor,
        prefix_rows: Tensor | None,
        segments: Segments,
    ) -> Tensor:
        """Map normalised patches [T, p*p*c] to tokens [T, C], learned ones in `prefix_rows`."""
        tokens_TC: Tensor = self.proj(patches_TP)
        if self.pos_embed is not None:
            # Rows without a patch get position 0: a class token replaces them, padding is ignored.
            place_T = (coords_T2[:, 0] * self.grid[1] + coords_T2[:, 1]).clamp(min=0)
            position_TC = nn.functional.embedding(place_T, self.pos_embed.flatten(0, 2))
            tokens_TC = tokens_TC + position_TC
        tokens_TC = put_prefix(tokens_TC, self.cls_token, prefix_rows)
        dropped: Tensor = self.drop(tokens_TC, segments)
        return dropped


class MegaVit(PackedViT):
    """Vision Transformer for images of one size.

    Args:
        image_size: pixels of a side, or (height, width); every image has this size.
        patch_size: pixels of a patch's side.
        num_classes: outputs of the head.
        dim: channels of a token.
        depth: number of transformer blocks.
        heads: attention heads.
        mlp_dim: hidden channels of the MLPs.
        pool: cls (a learned class token) or mean (of the patches).
        channels: channels of an image.
        dim_head: channels of a head; None: dim / heads.
        dropout: rate after the projections and in the MLPs, in training.
        emb_dropout: dropout rate of the embedded tokens, in training.
        parallel: attention and MLP side by side on one norm (ViT-22B); else one after the other.
        qk_norm: normalise queries and keys, which keeps training stable at scale (ViT-22B).
        layer_scale: initial layer scale; None: none.
        stochastic_depth: share of images that skip the last block's branches, in training;
            earlier blocks less, linearly.
        position: table (a learned position for each patch), rope (queries and keys are rotated) or
            rope+table.
        rope_base, rope_coordinates, rope_grid, rope_shift, rope_jitter, rope_rescale: of rotary
            positions, see `zeta.models.rotary.Rotary`; None: its defaults, those of DINOv3.
        mean, std: per channel or one for all, of pixels in [0, 1]; uint8 input is normalised with
            them.
        attention: back-end, see `zeta.models.attention`.
        seed: of the initial weights.

    Raises:
        ValueError: an argument out of range, by name.
    """

    embeds: FixedPatchEmbedding

    arch = "megavit"
    one_size = True

    def __init__(
        self,
        image_size: int | Sequence[int],
        patch_size: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        pool: str = "cls",
        channels: int = 3,
        dim_head: int | None = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        *,
        parallel: bool = True,
        qk_norm: bool = True,
        layer_scale: float | None = None,
        stochastic_depth: float = 0.0,
        position: str = "table",
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
        check_rates(dropout=dropout, emb_dropout=emb_dropout, stochastic_depth=stochastic_depth)
        check_layer_scale(layer_scale)
        check_choice("pool", pool, ("cls", "mean"))
        check_choice("position", position, POSITIONS)
        check_choice("attention", attention, BACKENDS)
        dim_head = head_width(dim, heads, dim_head)
        has_class_token = pool == "cls"
        super().__init__(patch_size, channels, mean, std, int(has_class_token))
        self.rotary = rotary(
            position,
            dim_head,
            is_rotary=position != "table",
            base=rope_base,
            coordinates=rope_coordinates,
            grid=rope_grid,
            shift=rope_shift,
            jitter=rope_jitter,
            rescale=rope_rescale,
        )
        grid = table_grid(image_size, patch_size)
        patch_dim = patch_size * patch_size * channels
        self.embeds = FixedPatchEmbedding(
            patch_dim, dim, grid, has_class_token, emb_dropout, table=position != "rope"
        )
        shape = BlockShape(
            dim, heads, dim_head, mlp_dim, dropout, layer_scale, qk_norm, backend=attention
        )
        block = ParallelBlock if parallel else Block
        self.blocks = nn.ModuleList(block(shape, r) for r in depth_rates(stochastic_depth, depth))
        self.norm = Norm(dim)
        self.head = Linear(dim, num_classes)
        self.init_weights(seed)

    def forward(self, img: PackedBatch | Images) -> Tensor:
        """Return logits [B, num_classes] of images [B, channels, height, width].

        Lists of images and packs (a row for every image they can hold) are accepted too. uint8 is
        normalised here, float is taken as normalised.

        Raises:
            ValueError: images that the model cannot take, by number and reason.
        """
        logits: Tensor = self.head(self.forward_embeddings(img))
        return logits

    def _pooled(self, x_TC: Tensor, packed: PackedTokens) -> Tensor:
        pool = first_tokens if self.prefix_tokens else mean_pool
        return pool(x_TC, packed.segments)

    @property
    def fixed_grid(self) -> tuple[int, int]:
        """The only (rows, columns) of patches that the model takes."""
        return self.embeds.grid

    def check_grids(self, grids: Sequence[tuple[int, int]]) -> None:
        """Raise ValueError for the first image whose size is not the model's."""
        height, width = (side * self.patch_size for side in self.embeds.grid)
        for image, (h, w) in enumerate(grids):
            if (h, w) != self.embeds.grid:
                raise ValueError(
                    f"image {image} is {h * self.patch_size} x {w * self.patch_size} pixels; "
                    f"MegaVit takes image_size={height} x {width} only: resize it, or use NaViT"
                )

    def grids_fit(self, pack: PackedBatch) -> Tensor | None:
        """Return whether every used image of a pack has the model's grid."""
        grid = torch.tensor(self.embeds.grid, device=pack.grids.device)
        unused = pack.cu_seqlens.diff()[:-1] == 0
        return ((pack.grids == grid).all(dim=1) | unused).all()
