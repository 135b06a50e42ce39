"""A small transformer over packed captions, built from the image model's layers.

Letters in shape suffixes: T tokens of all captions, I captions, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from zeta.config_field import check_range
from zeta.models.arguments import check_rates, check_sizes, head_width
from zeta.models.attention import Segments
from zeta.models.dropout import Dropout, draws_at_random, seeded
from zeta.models.flops import FlopRates, flop_rates
from zeta.models.layers import AttentionPool, Block, BlockShape, Norm, run_blocks
from zeta.models.linear import Linear
from zeta.models.parameters import EMBEDDING_HEAD, Rules, normal
from zeta.models.position import LINE_TABLE
from zeta.packed import PackedBatch

_SHAPES = 16
"""Number of different sequence lengths: enough for little padding, few enough for compiling."""

_DRAWS = 1
"""Number of this encoder among those of a model: its random draws differ from the images'."""


class TokenPositionEmbedding(nn.Module):
    """A learned vector for each token and for each place in a caption."""

    parameter_rules: ClassVar[Rules] = {"token_embed": normal(1.0), "pos_embed_text": LINE_TABLE}

    def __init__(self, vocab_size: int, max_tokens: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.token_embed = nn.Parameter(torch.empty(vocab_size, dim))
        self.pos_embed_text = nn.Parameter(torch.empty(1, max_tokens, dim))
        self.drop = Dropout(dropout)

    def forward(self, ids_T: Tensor, places_T: Tensor, segments: Segments) -> Tensor:
        """Map token ids [T] at places [T] of their captions to [T, C]."""
        tokens_TC = nn.functional.embedding(ids_T, self.token_embed)
        dropped: Tensor = self.drop(tokens_TC + self.pos_embed_text[0][places_T], segments)
        return dropped


class TextTower(nn.Module):
    """Encoder of captions that lie end to end in one sequence, each independent of the others.

    Args:
        vocab_size: number of different tokens.
        max_tokens: tokens of the longest caption.
        dim: channels of a token.
        depth: number of transformer blocks.
        heads: attention heads.
        mlp_dim: hidden channels of the MLPs.
        embed_dim: channels of a caption's embedding.
        dropout: rate on embedded tokens, after attention and in the MLPs, in training.
        attention: back-end, see `zeta.models.attention`.

    Raises:
        ValueError: an argument out of range, by name.
    """

    parameter_rules: ClassVar[Rules] = {"head.weight": EMBEDDING_HEAD}

    def __init__(
        self,
        vocab_size: int,
        max_tokens: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        embed_dim: int,
        dropout: float = 0.0,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, max_tokens=max_tokens, dim=dim, depth=depth)
        check_sizes(heads=heads, mlp_dim=mlp_dim, embed_dim=embed_dim)
        check_rates(dropout=dropout)
        self.vocab_size, self.max_tokens = vocab_size, max_tokens
        self.prefix_tokens = 0
        self.activation_checkpointing = False
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.stream_dtype: torch.dtype | None = None
        """dtype of the residual stream between the blocks; None: that of the embedding."""
        dim_head = head_width(dim, heads, None)
        self.embeds = TokenPositionEmbedding(vocab_size, max_tokens, dim, dropout)
        shape = BlockShape(dim, heads, dim_head, mlp_dim, dropout, backend=attention)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(depth))
        self.norm = Norm(dim)
        self.attn_pool = AttentionPool(shape)
        self.head = Linear(dim, embed_dim)

    def forward(self, captions: PackedBatch | Sequence[Sequence[int]]) -> Tensor:
        """Return the embedding [I, embed_dim] of every caption.

        Args:
            captions: a pack with captions, in which the embedding of an empty caption is
                meaningless; or the token ids of each caption.

        Raises:
            ValueError: the pack has no captions, or a caption is too long or has an unknown token.
        """
        if isinstance(captions, PackedBatch):
            ids_T, segments = _from_pack(captions)
        else:
            ids_T, segments = self._from_lists(captions)
        if self.training and self._draws_at_random:
            seeds_I = captions.draw_seeds if isinstance(captions, PackedBatch) else None
            segments = seeded(segments, seeds_I, salt=_DRAWS)
        starts_T = segments.cu_seqlens[segments.index_T]
        places_T = torch.arange(segments.num_tokens, device=ids_T.device) - starts_T
        # Rows of tail padding have no place in a caption.
        x_TC = self.embeds(ids_T, places_T.clamp(max=self.max_tokens - 1), segments)
        x_TC = x_TC.to(self.stream_dtype or x_TC.dtype)
        x_TC = run_blocks(self.blocks, x_TC, segments, recompute=self.activation_checkpointing)
        embeddings: Tensor = self.head(self.attn_pool(self.norm(x_TC), segments))
        return embeddings

    def training_flops(self, pack: PackedBatch) -> float:
        """Return the operations of training on the captions of `pack`, see `zeta.models.flops`."""
        return self._flop_rates.of(pack.text_lengths[:-1])

    @cached_property
    def _draws_at_random(self) -> bool:
        return draws_at_random(self)

    @cached_property
    def _flop_rates(self) -> FlopRates:
        return flop_rates(self)

    def _from_lists(self, captions: Sequence[Sequence[int]]) -> tuple[Tensor, Segments]:
        for number, ids in enumerate(captions):
            check_range(f"tokens of caption {number}", len(ids), 1, self.max_tokens)
            for token in ids:
                check_range(f"a token of caption {number}", token, 0, self.vocab_size - 1)
        device = self.head.weight.device
        ids_T = torch.tensor([token for ids in captions for token in ids], device=device)
        return ids_T, Segments.from_lengths([len(ids) for ids in captions], device)


def _from_pack(pack: PackedBatch) -> tuple[Tensor, Segments]:
    """Return the tokens of a pack's captions, with little tail padding (see `_SHAPES`)."""
    if pack.text_ids is None or pack.text_cu_seqlens is None:
        raise ValueError("the pack carries no captions: load it with data.require_captions")
    *lengths, tail = pack.text_lengths
    used, step = sum(lengths), -(-len(pack.text_ids) // _SHAPES)
    kept = min(used + tail, max(step, -(-used // step) * step))
    segments = Segments.from_boundaries(
        pack.text_cu_seqlens.clamp(max=kept), (*lengths, kept - used)
    )
    return pack.text_ids[:kept], segments
