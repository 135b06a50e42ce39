"""Dropout and stochastic depth whose draws belong to an image, not to a forward pass.

A draw is a hash of the image's seed, the layer, the place in the image and the channel, as in
counter-based random generators (Salmon et al. 2011). So it does not depend on the other images of a
forward pass, on their order, or on how often a block is recomputed, and it needs no state of a
generator, which compiled code and CUDA graphs could not advance.

Letters in shape suffixes: T tokens, S segments (images, then tail padding), I images, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from zeta.models.attention import Segments
from zeta.models.attention.moving import Move

_GOLDEN = 0x9E3779B9 - 2**32
"""2**32 over the golden ratio, as an int32: its multiples are spread evenly."""


def image_seeds(seeds: Sequence[int], images: int) -> Tensor:
    """Return a seed [packs, I] int32 for each image of packs, from their own seeds of 56 bits."""
    numbers_I = torch.arange(images, dtype=torch.int32)
    low_P1, high_P1 = (
        torch.tensor([[_as_int32(seed >> shift)] for seed in seeds], dtype=torch.int32)
        for shift in (0, 32)
    )
    return scrambled(scrambled(numbers_I * _GOLDEN + low_P1) ^ high_P1)


def scrambled(x: Tensor) -> Tensor:
    """Return a hash of int32 values, element by element (C. Wellons, "lowbias32")."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _as_int32(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _as_int32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - 2**32 if value >= 2**31 else value


def seeded(segments: Segments, seeds_I: Tensor | None, salt: int = 0) -> Segments:
    """Return `segments` with seeds for the embedding's draws; `by_layer` gives blocks theirs.

    Args:
        segments: one an image, then the tail.
        seeds_I: [I] int32 seed of each image; None: from torch's global generator.
        salt: number of the encoder, if a model has several.
    """
    device = segments.cu_seqlens.device
    if seeds_I is None:
        count = len(segments.lengths) - 1
        seeds_I = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, device=device)
    seeds_S = torch.nn.functional.pad(scrambled(seeds_I + _as_int32(salt * _GOLDEN)), (0, 1))
    return replace(segments, seeds_S=seeds_S)


def by_layer(segments: Segments, layers: int) -> Iterator[Segments]:
    """Yield `segments` for each of a number of layers, with other seeds for each."""
    if segments.seeds_S is None:
        yield from [segments] * layers
        return
    for seeds_S in layer_seeds(segments.seeds_S, layers).unbind():
        yield replace(segments, seeds_S=seeds_S)


def layer_seeds(seeds: Tensor, layers: int) -> Tensor:
    """Return the seeds [layers, n] int32 of each layer, from the seeds [n] of an encoder."""
    numbers_L = torch.arange(1, layers + 1, dtype=torch.int32, device=seeds.device)
    return scrambled(seeds + numbers_L[:, None] * _GOLDEN)


def draws_at_random(model: nn.Module) -> bool:
    """Return whether `model` has a layer that draws at random in training."""
    kinds = (Dropout, StochasticDepth)
    return any(module.rate > 0 for module in model.modules() if isinstance(module, kinds))


class Dropout(nn.Module):
    """Dropout of single values, in training (Srivastava et al. 2014)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_TC: Tensor, segments: Segments | None, site: int = 0) -> Tensor:
        """Zero random values of tokens [T, C]; scale the others to keep the mean.

        Args:
            x_TC: tokens.
            segments: with seeds.
            site: number of the place in the layer, for draws of its own.
        """
        if not self.training or self.rate == 0:
            return x_TC
        assert segments is not None
        assert segments.seeds_S is not None, "seeded() was not called"
        starts_T = segments.cu_seqlens[segments.index_T]
        places_T = torch.arange(len(x_TC), dtype=torch.int32, device=x_TC.device) - starts_T
        keys_T = scrambled(segments.seeds_S[segments.index_T] + (places_T + 1) * _GOLDEN)
        numbers_C = torch.arange(x_TC.shape[1], dtype=torch.int32, device=x_TC.device)
        keys_TC = scrambled(keys_T + _as_int32(site * _GOLDEN))[:, None] + numbers_C * _GOLDEN
        return torch.where(_kept(keys_TC, self.rate), x_TC / (1 - self.rate), 0.0)


class StochasticDepth(nn.Module):
    """A layer that skips a branch for random images, in training (Huang et al. 2016).

    Draws are made for all layers at once, before the first: see `zeta.models.skipping`.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(
        self,
        x_TC: Tensor,
        branch: Callable[[Tensor, Segments], Tensor],
        segments: Segments,
        skip: Skip | None = None,
    ) -> Tensor:
        """Return tokens [T, C] plus the branch, scaled to keep the mean, of those that have it.

        Args:
            x_TC: tokens.
            branch: maps tokens [n, C] and their segments to [n, C].
            segments: the images.
            skip: the images that skip the branch; None: none.
        """
        # It reads nothing of `self`: compiled code would be made for each rate.
        if skip is None:
            return x_TC + branch(x_TC, segments)
        if skip.some is None:
            return x_TC + _scaled(branch(x_TC, segments), skip.factor_S, segments)
        move, own = skip.some
        branch_KC = _scaled(branch(move.apply(x_TC), own), skip.factor_S, own)
        return x_TC + move.back().apply(branch_KC)


def _scaled(x_TC: Tensor, factor_S: Tensor, segments: Segments) -> Tensor:
    return x_TC * factor_S.to(x_TC.dtype)[segments.index_T, None]


@dataclass(frozen=True)
class Skip:
    """The images that skip a branch."""

    factor_S: Tensor
    """[S] factor on the branch, float32: 0 for images that skip it."""
    some: tuple[Move, Segments] | None = None
    """The move to the tokens of the images that do not skip it, and the segments of those tokens;
    None: the branch is run on all tokens."""


def keeps(seeds: Tensor, site: int, rate: float) -> Tensor:
    """Return for each int32 seed of a layer whether the image keeps the branch at `site`."""
    return _kept(seeds + _as_int32((site + 1) * _GOLDEN), rate)


def _kept(keys: Tensor, rate: float) -> Tensor:
    """Return a draw for each int32 key: true with probability 1 - rate."""
    return (scrambled(keys) & 0x7FFFFFFF) < round((1 - rate) * 2**31)
