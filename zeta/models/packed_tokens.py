"""Patches and token features of several images, with the image and place of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from zeta.models.attention import Segments


@dataclass(frozen=True)
class TokenFeatures:
    """Features of every token, with its image and its place in the image."""

    features: Tensor
    """[T, C] after the last norm."""
    image_index: Tensor
    """[T] int64 image of each token; I, the number of images, in tail padding."""
    coords: Tensor
    """[T, 2] (y, x) of the patch; -1 for other tokens (class, register, padding)."""


@dataclass(frozen=True)
class PackedTokens:
    """The input of an encoder. Letters: T tokens, I images, p patch side, c channels."""

    patches: Tensor
    """[T, p*p*c] uint8, or float that is already normalised."""
    coords: Tensor
    """[T, 2] (y, x); -1 in prefix and padding rows."""
    grids: Tensor
    """[I, 2] (h, w) of each image's whole grid, in patches."""
    segments: Segments
    image_order: Tensor | None = None
    """[I] index in `segments` of each image of the original order; None: the same order."""
    token_order: Tensor | None = None
    """[T] row here of each token of the original order; None: the same order."""
    host_seeds: tuple[int, ...] = ()
    """Seed of each image's draws, on the host, in the order of `segments`; empty: not known."""

    def sorted_by_length(self) -> PackedTokens:
        """Sort images by length, so that the CPU back-end can batch those of equal length."""
        *lengths, tail = self.segments.lengths
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        if all(lengths[a] == lengths[b] for a, b in enumerate(order)):
            return self
        starts = (0, *accumulate(lengths))
        pieces = [torch.arange(starts[i], starts[i] + lengths[i]) for i in order]
        rows = torch.cat([*pieces, torch.arange(starts[-1], starts[-1] + tail)])
        images = torch.tensor(order)
        segments = Segments.from_lengths(
            [lengths[i] for i in order], self.segments.cu_seqlens.device, tail
        )
        if (seeds_S := self.segments.seeds_S) is not None:
            segments = replace(segments, seeds_S=torch.cat([seeds_S[images], seeds_S[-1:]]))
        return PackedTokens(
            self.patches[rows],
            self.coords[rows],
            self.grids[images],
            segments,
            images.argsort(),
            rows.argsort(),
            tuple(self.host_seeds[i] for i in order) if self.host_seeds else (),
        )

    def prefix_rows(self, prefix_tokens: int) -> Tensor:
        """Return the row numbers (on the host) of all prefix tokens, image by image."""
        *lengths, _ = self.segments.lengths
        starts = accumulate(lengths, initial=0)
        used = [start for start, length in zip(starts, lengths, strict=False) if length]
        return (
            torch.tensor(used, dtype=torch.int64)[:, None] + torch.arange(prefix_tokens)
        ).flatten()
