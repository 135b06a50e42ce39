"""Which images skip a branch, of each block, and the tokens that it is then run on.

A draw belongs to an image (`zeta.models.dropout`), so the host can know all draws of a forward pass
before it begins. A branch is then run on the tokens of the images that keep it. Their number is
rounded up to a multiple of 1/16 of all tokens, so that few shapes occur; the places left over hold
tokens of other images, whose result is set to zero. Where that leaves out no more than 1/16 of the
tokens, and where the host does not know the draws, a branch is run on all.

Letters in shape suffixes: B branches of all blocks, I images, S segments (images, then the tail),
T tokens, R rows of all branches end to end.

These lines never ran on a device: `_sent` with pinned memory. The rest was run on a CPU, eagerly
and compiled.
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

SHARES = 16
"""Sizes that the input of a branch may have: multiples of 1/16 of the tokens."""


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
    for number, factor_S in enumerate(_sent(factors, device)):
        branch = branches[number]
        plans[branch.layer][branch.site] = Skip(factor_S, parts.get(number))
    return plans


def _parts(
    branches: Sequence[Branch], layers: Sequence[Segments], kept_BS: Tensor
) -> dict[int, tuple[Move, Segments]]:
    """Return the tokens that branches are run on, by number of the branch; no entry: all."""
    lengths_S = torch.tensor(layers[0].lengths, device="cpu")
    kept_BS[:, -1] = False  # the tail
    sizes, lengths_BS = _capacities(lengths_S, kept_BS)
    tokens = layers[0].num_tokens
    # All branches of a block or none: compiled code is made for each combination.
    less = {b.layer for b, size in zip(branches, sizes, strict=True) if size < tokens}
    used = [number for number, branch in enumerate(branches) if branch.layer in less]
    if not used:
        return {}
    parts = _gathered(layers[0], [sizes[number] for number in used], lengths_BS[used])
    return {
        number: (move, replace(own, seeds_S=layers[branches[number].layer].seeds_S))
        for number, (move, own) in zip(used, parts, strict=True)
    }


def _capacities(lengths_S: Tensor, kept_BS: Tensor) -> tuple[list[int], Tensor]:
    """Return the tokens that each branch is run on, and those of each segment [B, S]."""
    tokens = int(lengths_S.sum())
    step = -(-tokens // SHARES)
    whole_BS, rest_BS = lengths_S * kept_BS, lengths_S * ~kept_BS
    kept_B = whole_BS.sum(dim=1)
    # At least one step: at ZeRO-3 the modules of a branch are run, whatever the draws are.
    sizes_B = ((kept_B + step - 1) // step).clamp(min=1) * step
    sizes_B = sizes_B.clamp(max=tokens)
    spare_BS = (sizes_B - kept_B)[:, None] - (rest_BS.cumsum(dim=1) - rest_BS)
    return sizes_B.tolist(), whole_BS + spare_BS.clamp(min=0).minimum(rest_BS)


def _gathered(
    segments: Segments, sizes: Sequence[int], lengths_BS: Tensor
) -> list[tuple[Move, Segments]]:
    """Return the move to the tokens of each branch, and their segments.

    Segments keep their numbers; each gives its first `lengths_BS` tokens.
    """
    device, branches, count = segments.cu_seqlens.device, *lengths_BS.shape
    ends_BS = _sent(F.pad(lengths_BS.cumsum(dim=1), (1, 0)).int(), device)
    shift_BS = segments.cu_seqlens[:-1] - ends_BS[:, :-1]
    numbers = torch.arange(branches * count, device=device)
    numbers_R = torch.repeat_interleave(numbers, ends_BS.diff().flatten(), output_size=sum(sizes))
    shift_R = shift_BS.flatten()[numbers_R]
    parts = zip(
        ends_BS.unbind(),
        lengths_BS.tolist(),
        (numbers_R % count).split(list(sizes)),
        shift_R.split(list(sizes)),
        strict=True,
    )
    found = []
    for ends, lengths, index, shift in parts:
        move = _move(shift + torch.arange(len(shift), device=device), segments.num_tokens)
        own = replace(segments, cu_seqlens=ends, lengths=tuple(lengths), index_T=index, derived={})
        found.append((move, replace(own, rotary=_rotary(segments, move))))
    return found


def _move(rows: Tensor, tokens: int) -> Move:
    """Return the move to these rows of a sequence, and back: the others stay away."""
    numbers = torch.arange(tokens, device=rows.device)
    # A row that stays away reads any row; not all the same one.
    back = (numbers % len(rows)).index_copy_(0, rows, numbers[: len(rows)])
    absent = torch.ones_like(numbers, dtype=torch.bool).index_fill_(0, rows, False)
    return Move(rows, back, None, absent)


def _rotary(segments: Segments, move: Move) -> tuple[Tensor, Tensor] | None:
    if segments.rotary is None:
        return None
    cosines_TD, sines_TD = segments.rotary
    return cosines_TD[move.rows_B], sines_TD[move.rows_B]


def _sent(table: Tensor, device: torch.device) -> Tensor:
    """Copy a table to the device without waiting for it."""
    table = table.pin_memory() if device.type == "cuda" and torch.cuda.is_available() else table
    return table.to(device, non_blocking=True)
