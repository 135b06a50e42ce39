"""Attention within segments as dense batches: images of equal or nearly equal length side by side.

Dense kernels are about twice as fast as those that take boundaries, at 50 to 256 tokens an image.
Segments, in any order, are grouped by length; a group is padded to its longest member, by at most
`MOST_PADDING` of it, and its padding is masked out. Groups of one length need no mask, and torch
takes its fastest kernel for them.

The shapes follow the lengths of the pack, so that no CUDA graph of one pack serves another, and
within a compiled block the attention is a break of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zeta.models.attention.moving import Move
from zeta.models.attention.segments import Queries, Segments

MOST_PADDING = 1 / 8
"""Largest share of a padded row that is padding."""


@dataclass(frozen=True)
class Group:
    """Segments that are one dense batch."""

    members: tuple[int, ...]
    """Numbers of its segments, longest first."""
    length: int
    """Tokens of the longest one."""


@dataclass(frozen=True)
class Plan:
    """The dense batches of one pack."""

    groups: tuple[Group, ...]
    keys: Move
    masks: tuple[Tensor | None, ...]
    """Mask [members, 1, 1, length] of the keys of each group; None: no padding."""


def groups(lengths: Sequence[int]) -> tuple[Group, ...]:
    """Group the segments that are not empty by length, from the longest to the shortest."""
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    found: list[list[int]] = []
    for i in order:
        if not found or lengths[i] < lengths[found[-1][0]] * (1 - MOST_PADDING):
            found.append([])
        found[-1].append(i)
    return tuple(Group(tuple(members), lengths[members[0]]) for members in found)


def _plan(keys: Segments) -> Plan:
    """Plan the dense batches of all segments but the tail; once a forward pass, on the host."""
    found, device = groups(keys.lengths[:-1]), keys.cu_seqlens.device
    masks: list[Tensor | None] = []
    for group in found:
        full = np.arange(group.length) < _column(keys.lengths, group)
        masks.append(None if full.all() else _sent(full[:, None, None], device))
    return Plan(found, _move(found, keys.lengths, None, device), tuple(masks))


def _move(
    found: tuple[Group, ...],
    lengths: Sequence[int],
    per_segment: int | None,
    device: torch.device,
) -> Move:
    """Return the move of rows, `lengths[i]` a segment, to the padded rows of the groups."""
    starts = tuple(accumulate(lengths, initial=0))
    rows, used = [np.empty(0, np.int64)], [np.empty(0, bool)]
    for group in found:
        place, start = np.arange(per_segment or group.length), _column(starts, group)
        full = place < _column(lengths, group)
        rows.append(np.where(full, start + place, start).ravel())
        used.append(full.ravel())
    rows_B, used_B = np.concatenate(rows), np.concatenate(used)
    rows_A, used_A = np.zeros(starts[-1], np.int64), np.zeros(starts[-1], bool)
    rows_A[rows_B[used_B]] = used_B.nonzero()[0]
    used_A[rows_B[used_B]] = True
    unused = [None if each.all() else _sent(~each, device) for each in (used_B, used_A)]
    return Move(_sent(rows_B, device), _sent(rows_A, device), *unused)


def _column(values: Sequence[int], group: Group) -> np.ndarray[Any, Any]:
    return np.array([values[i] for i in group.members])[:, None]


def _sent(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """Copy a table to the device without waiting for it."""
    table = torch.from_numpy(array)
    table = table.pin_memory() if device.type == "cuda" and torch.cuda.is_available() else table
    return table.to(device, non_blocking=True)


def _dense(q_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, queries: Queries, keys: Segments) -> Tensor:
    """Compute attention of queries [Q, H, D] over keys and values [T, H, D], within segments.

    Queries on the tail and on empty segments give zeros.
    """
    plan = keys.derived.get("dense")
    if plan is None:
        plan = keys.derived["dense"] = _plan(keys)
    if not plan.groups:
        return (q_QHD * 0 + v_THD.sum() * 0).to(v_THD.dtype)
    n = queries.per_segment
    move = plan.keys
    if n:
        move = _move(plan.groups, [n] * len(keys.lengths), n, q_QHD.device)
    k, v = plan.keys.apply(k_THD), plan.keys.apply(v_THD)
    sizes = [(len(group.members), group.length) for group in plan.groups]
    parts = zip(
        _batches(move.apply(q_QHD), [(count, n or length) for count, length in sizes]),
        _batches(k, sizes),
        _batches(v, sizes),
        plan.masks,
        strict=True,
    )
    outs = [F.scaled_dot_product_attention(q, k, v, attn_mask=mask) for q, k, v, mask in parts]
    rows = [out.transpose(1, 2).flatten(0, 1) for out in outs]
    return move.back().apply(torch.cat(rows))


def _batches(rows_BHD: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Cut padded rows into batches [members, H, length, D]."""
    ends = accumulate((count * length for count, length in sizes), initial=0)
    return [
        rows_BHD[start:stop].unflatten(0, size).transpose(1, 2)
        for size, (start, stop) in zip(sizes, pairwise(ends), strict=True)
    ]


dense: Callable[[Tensor, Tensor, Tensor, Queries, Segments], Tensor] = torch.compiler.disable(
    _dense
)
"""`_dense`, which compiled code calls and does not trace."""
