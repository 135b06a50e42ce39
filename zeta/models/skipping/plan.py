"""Draw the images that skip each branch of each block.

Letters in shape suffixes: B branches of all blocks, S segments (images, then the tail).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from zeta.models.attention import Segments
from zeta.models.attention.moving import Move
from zeta.models.dropout import Skip, keeps, layer_seeds, scrambled
from zeta.models.skipping.tokens import capacities, gathered, sent


@dataclass(frozen=True)
class Branch:
    """A branch that some images skip."""

    layer: int
    """Number of its block."""
    site: int
    """Number of the branch in the block, for draws of its own."""
    rate: float
    """Share of images that skip it."""


def plan_skips(
    branches: Sequence[Branch], layers: Sequence[Segments], seeds: Sequence[int]
) -> list[dict[int, Skip]]:
    """Return for each layer the images that skip its branches, by site.

    Args:
        branches: the branches that draw.
        layers: the segments of each layer, with its seeds.
        seeds: the seed of each image (`PackedBatch.draw_seeds`) on the host; empty: not known.
    """
    plans: list[dict[int, Skip]] = [{} for _ in layers]
    if not branches:
        return plans
    device = layers[0].cu_seqlens.device
    if seeds:
        own = F.pad(scrambled(torch.tensor(seeds, dtype=torch.int32, device="cpu")), (0, 1))
        draws = list(layer_seeds(own, len(layers)))
    else:
        assert all(layer.seeds_S is not None for layer in layers), "seeded() was not called"
        draws = [layer.seeds_S for layer in layers if layer.seeds_S is not None]
    kept_BS = torch.stack([keeps(draws[b.layer], b.site, b.rate) for b in branches])
    factors = torch.stack(
        [k.float() / (1 - b.rate) for k, b in zip(kept_BS, branches, strict=True)]
    )
    parts = _parts(branches, layers, kept_BS) if seeds else {}
    for number, factor_S in enumerate(sent(factors, device) if seeds else factors):
        branch = branches[number]
        plans[branch.layer][branch.site] = Skip(factor_S, parts.get(number))
    return plans


def _parts(
    branches: Sequence[Branch], layers: Sequence[Segments], kept_BS: Tensor
) -> dict[int, tuple[Move, Segments]]:
    """Return the tokens that branches are run on, by number of the branch; no entry: all."""
    lengths_S = torch.tensor(layers[0].lengths, device="cpu")
    kept_BS[:, -1] = False  # the tail
    sizes, lengths_BS = capacities(lengths_S, kept_BS)
    tokens = layers[0].num_tokens
    # All branches of a block or none: compiled code is made for each combination.
    less = {b.layer for b, size in zip(branches, sizes, strict=True) if size < tokens}
    used = [number for number, branch in enumerate(branches) if branch.layer in less]
    if not used:
        return {}
    parts = gathered(layers[0], [sizes[number] for number in used], lengths_BS[used])
    return {
        number: (move, replace(own, seeds_S=layers[branches[number].layer].seeds_S))
        for number, (move, own) in zip(used, parts, strict=True)
    }
