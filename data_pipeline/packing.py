"""Fill packs of one token budget with images of known length and cost.

LPT ("longest processing time first", Graham 1969) on the cost of attention and linear layers:
each image, dearest first, goes onto the cheapest open pack that has room. Packs of a step then
cost about the same, so ranks do not wait for each other, and short images fill the gaps.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PackLimits:
    """What every pack of a run may hold."""

    token_budget: int
    max_images: int


def image_costs(lengths: Ints, dim: int) -> Floats:
    """Return the relative training cost l (1 + l / 6d) of images of `lengths` tokens at width d.

    A transformer block does 24 l d^2 FLOPs in its linear layers and 4 l^2 d in attention.
    """
    return lengths * (1 + lengths / (6 * dim))


def pack_window(
    lengths: Ints, costs: Floats, limits: PackLimits, *, num_first: int = 0, flush: bool = False
) -> tuple[list[list[int]], list[int]]:
    """Pack a window of images; return packs and leftovers as indices into `lengths`.

    Args:
        lengths: [n] tokens of each image, none above the budget.
        costs: [n] cost of each image.
        limits: token budget and image limit of a pack.
        num_first: the first so many images were left over before: they are placed before all
            others, so that no image is ever left over twice in a row by its size.
        flush: the stream ends here: leave nothing over, even if the last packs are not full.

    Returns:
        packs (each a non-empty list of indices) and the leftovers, in the order given.
    """
    num_packs = _num_full_packs(lengths, limits)
    if flush:
        num_packs = max(num_packs, 1 if len(lengths) else 0)
    order = sorted(range(len(lengths)), key=lambda i: (i >= num_first, -costs[i], i))
    packs, leftovers = _place(order, lengths.tolist(), costs.tolist(), limits, num_packs)
    while flush and leftovers:
        more, leftovers = _place(leftovers, lengths.tolist(), costs.tolist(), limits, 1)
        packs += more
    return [pack for pack in packs if pack], sorted(leftovers)


def _num_full_packs(lengths: Ints, limits: PackLimits) -> int:
    """Return how many packs these images can fill, by tokens or by count of images."""
    return max(int(lengths.sum()) // limits.token_budget, len(lengths) // limits.max_images)


def _place(
    order: list[int],
    lengths: list[int],
    costs: list[float],
    limits: PackLimits,
    num_packs: int,
) -> tuple[list[list[int]], list[int]]:
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    room = [limits.token_budget] * num_packs
    heap = [(0.0, pack) for pack in range(num_packs)]
    leftovers: list[int] = []
    shortest = min((lengths[i] for i in order), default=0)
    for i in order:
        length, passed_over = lengths[i], []
        while heap:
            cost, pack = heapq.heappop(heap)
            if room[pack] >= length:
                packs[pack].append(i)
                room[pack] -= length
                # A pack that cannot take even the shortest image is closed: left off the heap.
                if room[pack] >= shortest and len(packs[pack]) < limits.max_images:
                    heapq.heappush(heap, (cost + costs[i], pack))
                break
            passed_over.append((cost, pack))
        else:
            leftovers.append(i)
        for item in passed_over:
            heapq.heappush(heap, item)
    return packs, leftovers
