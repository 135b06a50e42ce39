"""Fill packs of one token budget with images of known length and cost.

All packs of a step must be full and cost the same, so that no rank waits for another. The cost
l (1 + l / 6d) is tokens plus a part that grows with l squared, and only that part can differ
between full packs. So images are dealt longest first (LPT, Graham 1969), each onto the pack that
would end cheapest if the rest of its room were filled with average images of those still to come;
the shortest images, which cost about the same wherever they go, then fill the gaps, each in the
pack where it fits tightest.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_TAIL_SHARE = 0.12
"""Share of all tokens, in the shortest images, that is kept back to fill gaps."""
_ROUNDS_PER_PACK = 8
"""Images are dealt in rounds of 1 / 8 of the packs: nearly as even as one by one, and fast."""


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


def num_full_packs(lengths: Ints, limits: PackLimits) -> int:
    """Return how many packs these images can fill, by tokens or by count of images."""
    return max(int(lengths.sum()) // limits.token_budget, len(lengths) // limits.max_images)


def pack_window(
    lengths: Ints, costs: Floats, limits: PackLimits, *, num_first: int = 0, flush: bool = False
) -> tuple[list[Ints], Ints]:
    """Pack a window of images; return packs and leftovers as indices into `lengths`.

    Args:
        lengths: [n] tokens of each image, none above the budget.
        costs: [n] cost of each image.
        limits: token budget and image limit of a pack.
        num_first: the first so many images were left over before: they are placed before all
            others, in packs of their own if need be, so that no image is left over twice.
        flush: the stream ends here: leave nothing over, even if the last packs are not full.

    Returns:
        packs (each a non-empty array of indices) and the leftovers, ascending.
    """
    num_packs = num_full_packs(lengths, limits)
    if flush or num_first:
        num_packs = max(num_packs, 1 if len(lengths) else 0)
    order = np.lexsort((-lengths, np.arange(len(lengths)) >= num_first))
    packs, rest = _place(order, lengths, costs, limits, num_packs)
    while len(rest) and (flush or rest.min() < num_first):
        more, rest = _place(rest, lengths, costs, limits, 1)
        packs += more
    return [pack for pack in packs if len(pack)], np.sort(rest)


def _place(
    order: Ints, lengths: Ints, costs: Floats, limits: PackLimits, num_packs: int
) -> tuple[list[Ints], Ints]:
    """Place the images, in `order`, onto `num_packs` packs; return packs and what had no room."""
    if num_packs == 0:
        return [], order
    packs = _OpenPacks(limits, num_packs)
    dealt = packs.deal(lengths[order], costs[order])
    home = np.concatenate([dealt, packs.fill_gaps(lengths[order[len(dealt) :]].tolist())])
    by_home = np.argsort(home, kind="stable")
    bounds = np.searchsorted(home[by_home], np.arange(num_packs + 1))
    sorted_images = order[by_home]
    filled = [sorted_images[bounds[i] : bounds[i + 1]] for i in range(num_packs)]
    return filled, order[home < 0]


class _OpenPacks:
    """Packs that are being filled; a home of -1 means that an image found no room."""

    def __init__(self, limits: PackLimits, num_packs: int) -> None:
        self._limits = limits
        self._room = np.full(num_packs, limits.token_budget)
        self._images = np.zeros(num_packs, dtype=np.int64)
        self._costs = np.zeros(num_packs)

    def deal(self, lengths: Ints, costs: Floats) -> Ints:
        """Place images in order, all but the tail; return the pack of each placed so far."""
        num_packs, budget = len(self._room), self._limits.token_budget
        tokens_left = np.cumsum(lengths[::-1])[::-1]
        costs_left = np.cumsum(costs[::-1])[::-1]
        # Where the limit of images binds, packs end below their budget.
        unused = max(0.0, budget - tokens_left[0] / num_packs)
        tail = _TAIL_SHARE * min(int(tokens_left[0]), num_packs * budget)
        surplus = max(0, int(tokens_left[0]) - num_packs * budget)
        stop = int(np.searchsorted(-tokens_left, -(tail + surplus)))
        batch = max(1, num_packs // _ROUNDS_PER_PACK)
        home = np.full(stop, -1, dtype=np.int64)
        start = 0
        while start < stop:
            count = min(batch, stop - start)
            longest = lengths[start : start + count].max()
            fits = (self._room >= longest) & (self._images < self._limits.max_images)
            final = self._costs + np.maximum(self._room - unused, 0) * (
                costs_left[start] / tokens_left[start]
            )
            chosen = np.argsort(np.where(fits, final, np.inf), kind="stable")[
                : min(count, int(fits.sum()))
            ]
            if len(chosen) == 0:
                break
            images = slice(start, start + len(chosen))
            home[images] = chosen
            self._room[chosen] -= lengths[images]
            self._costs[chosen] += costs[images]
            self._images[chosen] += 1
            start += len(chosen)
        return home[:start]

    def fill_gaps(self, lengths: list[int]) -> Ints:
        """Place each image where it leaves the least room; return the pack of each, or -1."""
        shortest, max_images = min(lengths, default=0), self._limits.max_images
        images = self._images.tolist()
        rooms = sorted(
            (room, pack)
            for pack, room in enumerate(self._room.tolist())
            if room >= shortest and images[pack] < max_images
        )
        home = []
        for length in lengths:
            index = bisect_left(rooms, (length, -1))
            if index == len(rooms):
                home.append(-1)
                continue
            room, pack = rooms.pop(index)
            home.append(pack)
            images[pack] += 1
            if room - length >= shortest and images[pack] < max_images:
                insort(rooms, (room - length, pack))
        return np.array(home, dtype=np.int64)
