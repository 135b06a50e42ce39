"""The tokens that a branch is run on, and the way to them and back.

Letters in shape suffixes: B branches, S segments (images, then the tail), R rows of all branches
end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from zeta.models.attention import Segments
from zeta.models.attention.moving import Move

SHARES = 16
"""Sizes that the input of a branch may have: multiples of 1/16 of the tokens."""


def capacities(lengths_S: Tensor, kept_BS: Tensor) -> tuple[list[int], Tensor]:
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


def gathered(
    segments: Segments, sizes: Sequence[int], lengths_BS: Tensor
) -> list[tuple[Move, Segments]]:
    """Return the move to the tokens of each branch, and their segments.

    Segments keep their numbers; each gives its first `lengths_BS` tokens.
    """
    device, branches, count = segments.cu_seqlens.device, *lengths_BS.shape
    ends_BS = sent(F.pad(lengths_BS.cumsum(dim=1), (1, 0)).int(), device)
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


def sent(table: Tensor, device: torch.device) -> Tensor:
    """Copy a table of the host to the device without waiting for it."""
    table = table.pin_memory() if device.type == "cuda" and torch.cuda.is_available() else table
    return table.to(device, non_blocking=True)
