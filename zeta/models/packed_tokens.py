"""Patches of several images on the model's device, and where each of them belongs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from zeta.models.attention import Segments


@dataclass(frozen=True)
class TokenFeatures:
    """Features of every token, and where it comes from."""

    features: Tensor
    """[T, C] after the last norm."""
    image_index: Tensor
    """[T] int64 image of each token; the number of images I in tail padding."""
    coords: Tensor
    """[T, 2] (y, x) of the patch; -1 where the token is none (class, register, padding)."""


@dataclass(frozen=True)
class PackedTokens:
    """What an encoder takes. Letters: T tokens, I images, p patch side, c channels."""

    patches: Tensor
    """[T, p*p*c] uint8, or float that is already normalised."""
    coords: Tensor
    """[T, 2] (y, x); -1 in prefix and padding rows."""
    grids: Tensor
    """[I, 2] (h, w) of each image's whole grid, in patches."""
    segments: Segments
    image_order: Tensor | None = None
    """[I] for each image as given, its place among `segments`; None: the same order."""
    token_order: Tensor | None = None
    """[T] for each token as given, its row here; None: the same order."""

    def sorted_by_length(self) -> PackedTokens:
        """Lay images of equal length side by side, where the CPU back-end batches them."""
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
        return PackedTokens(
            self.patches[rows],
            self.coords[rows],
            self.grids[images],
            segments,
            images.argsort(),
            rows.argsort(),
        )

    def prefix_rows(self, prefix_tokens: int) -> Tensor:
        """Return the rows, on the host, of the first tokens of every image, image by image."""
        *lengths, _ = self.segments.lengths
        starts = accumulate(lengths, initial=0)
        used = [start for start, length in zip(starts, lengths, strict=False) if length]
        return (
            torch.tensor(used, dtype=torch.int64)[:, None] + torch.arange(prefix_tokens)
        ).flatten()
