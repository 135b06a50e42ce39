"""Packing: fill packs of one token budget with images of known length and cost.

All packs of a step must be full and cost the same, so that no rank waits for another. The cost
l (1 + l / 6d) is tokens plus a part that grows with l squared, and only that part can differ
between full packs. So images are placed longest first (LPT, Graham 1969), each in the pack that
would end cheapest if the rest of its room were filled with the average of the images to come. The
shortest images, which cost about the same anywhere, then fill the gaps, each in the pack where it
fits tightest. If more than a little stays unused, packs exchange images.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from data_pipeline.plan.arrays import Bools, Floats, Ints

_TAIL_SHARES = (0.12, 0.2, 0.3)
"""Shares of all tokens, in the shortest images, that are kept back to fill gaps. A later share is
tried only if the one before leaves gaps above `_FULL_ENOUGH`."""
_FULL_ENOUGH = 0.002
"""Share of the budget that may stay unused."""
_WORTH_A_SEARCH = 0.002
"""Share of the budget that a pack may leave unused without a search for images to fill it."""
_SEARCHES = 2
"""Most searches for one pack."""
_EXCHANGE_WITH = 32
"""Number of packs that one pack may exchange images with: those with the most room."""
_ROUNDS_PER_PACK = 8
"""Images are placed in rounds of 1 / 8 of the packs: fast, and nearly as even as one by one."""


@dataclass(frozen=True)
class PackLimits:
    """The limits of every pack of a run."""

    token_budget: int
    """Most tokens."""
    max_images: int
    """Most images."""


def image_costs(lengths: Ints, dim: int) -> Floats:
    """Return the relative training cost l (1 + l / 6d) of images of `lengths` tokens: [n] each.

    A transformer block of width d = `dim` does 24 l d^2 FLOPs in its linear layers and 4 l^2 d in
    attention.
    """
    return lengths * (1 + lengths / (6 * dim))


def num_full_packs(tokens: int, images: int, limits: PackLimits) -> int:
    """Return the number of packs that images of so many tokens fill, by tokens or by count."""
    return max(tokens // limits.token_budget, images // limits.max_images)


def pack_window(
    lengths: Ints, costs: Floats, limits: PackLimits, *, num_first: int = 0, flush: bool = False
) -> tuple[list[Ints], Ints]:
    """Pack a window of images; return packs and leftovers as indices into `lengths`.

    Args:
        lengths: [n] tokens of each image, none above the budget.
        costs: [n] cost of each image.
        limits: token budget and image limit of a pack.
        num_first: number of images, at the front, that the previous window left over. They are
            placed before all others, in packs of their own if need be, so that no image is left
            over twice.
        flush: leave nothing over, even if the last packs are not full: the stream ends here.

    Returns:
        The packs, each a non-empty array of indices, and the leftovers, ascending.
    """
    num_packs = num_full_packs(int(lengths.sum()), len(lengths), limits)
    if flush or num_first:
        num_packs = max(num_packs, 1 if len(lengths) else 0)
    order = np.argsort(-lengths, kind="stable")
    packs, rest = _place(order, lengths, costs, limits, num_packs, num_first)
    while len(rest) and (flush or rest.min() < num_first):
        more, rest = _place(rest, lengths, costs, limits, 1, num_first)
        packs += more
    return [pack for pack in packs if len(pack)], np.sort(rest)


def _place(
    order: Ints, lengths: Ints, costs: Floats, limits: PackLimits, num_packs: int, num_first: int
) -> tuple[list[Ints], Ints]:
    """Place the images in `num_packs` packs, in `order`; return packs, and images without room."""
    if num_packs == 0:
        return [], order
    best = np.empty(0, dtype=np.int64), order
    best_room = np.inf
    by_tokens = int(lengths[order].sum()) >= num_packs * limits.token_budget
    for tail_share in _TAIL_SHARES if by_tokens else _TAIL_SHARES[:1]:
        packs = _OpenPacks(limits, num_packs)
        placed = packs.place_longest(lengths[order], costs[order], tail_share)
        # Leftovers of the previous window fill the gaps first.
        tail = order[len(placed) :]
        tail = tail[np.argsort(tail >= num_first, kind="stable")]
        tried = np.concatenate([order[: len(placed)], tail])
        home = np.concatenate([placed, packs.fill_gaps(lengths[tail].tolist())])
        packs.make_room(home, lengths[tried], first=tried < num_first)
        if packs.room < best_room:
            best, best_room = (home, tried), packs.room
        if packs.room <= _FULL_ENOUGH * num_packs * limits.token_budget or (home >= 0).all():
            break
    home, order = best
    by_home = np.argsort(home, kind="stable")
    bounds = np.searchsorted(home[by_home], np.arange(num_packs + 1))
    sorted_images = order[by_home]
    filled = [sorted_images[bounds[i] : bounds[i + 1]] for i in range(num_packs)]
    return filled, order[home < 0]


class _OpenPacks:
    """Packs that are being filled. The home of an image is its pack, or -1 if it found no room."""

    def __init__(self, limits: PackLimits, num_packs: int) -> None:
        self._limits = limits
        self._room = np.full(num_packs, limits.token_budget)
        self._images = np.zeros(num_packs, dtype=np.int64)
        self._costs = np.zeros(num_packs)

    @property
    def room(self) -> int:
        """Free tokens of all packs together."""
        return int(self._room.sum())

    def place_longest(self, lengths: Ints, costs: Floats, tail_share: float) -> Ints:
        """Place images in order, except for the tail; return the home of each one placed."""
        num_packs, budget = len(self._room), self._limits.token_budget
        tokens_left = np.cumsum(lengths[::-1])[::-1]
        costs_left = np.cumsum(costs[::-1])[::-1]
        # If the image limit binds, packs end below their budget.
        unused = max(0.0, budget - tokens_left[0] / num_packs)
        tail = tail_share * min(int(tokens_left[0]), num_packs * budget)
        surplus = max(0, int(tokens_left[0]) - num_packs * budget)
        stop = int(np.searchsorted(-tokens_left, -(tail + surplus)))
        batch = max(1, num_packs // _ROUNDS_PER_PACK)
        most_images = self._limits.max_images
        # Plain numbers: numpy takes several times as long for the few packs of a round.
        room, packed, spent = self._room.tolist(), self._images.tolist(), self._costs.tolist()
        to_fill = [max(free - unused, 0.0) for free in room]
        rates = (costs_left[:stop] / tokens_left[:stop]).tolist()
        tokens, prices, home = lengths.tolist(), costs.tolist(), list[int]()
        while len(home) < stop:
            image = len(home)
            longest, rate = tokens[image], rates[image]  # in order: the first is the longest
            final = {
                pack: spent[pack] + to_fill[pack] * rate
                for pack, free in enumerate(room)
                if free >= longest and packed[pack] < most_images
            }
            chosen = sorted(final, key=final.__getitem__)[: min(batch, stop - image)]
            if not chosen:
                break
            for number, pack in enumerate(chosen, start=image):
                room[pack] -= tokens[number]
                to_fill[pack] = max(room[pack] - unused, 0.0)
                spent[pack] += prices[number]
                packed[pack] += 1
            home += chosen
        self._room = np.array(room, dtype=np.int64)
        self._images = np.array(packed, dtype=np.int64)
        self._costs = np.array(spent, dtype=np.float64)
        return np.array(home, dtype=np.int64)

    def fill_gaps(self, lengths: list[int]) -> Ints:
        """Place each image where it leaves the least room; return the home of each."""
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
            self._room[pack] -= length
            images[pack] += 1
            if room - length >= shortest and images[pack] < max_images:
                insort(rooms, (room - length, pack))
        self._images = np.array(images, dtype=np.int64)
        return np.array(home, dtype=np.int64)

    def make_room(self, home: Ints, lengths: Ints, first: Bools) -> None:
        """Exchange images between packs so that images without room fit tightly.

        If there are few distinct lengths (photographs of a few cameras), the shortest images do not
        fill the gaps. Then a pack gives an image to another pack with room, takes a shorter one in
        return, and gains room for an image that waits. `home` is changed in place; images marked
        in `first` come before others.
        """
        least = self._limits.token_budget * _WORTH_A_SEARCH
        for _ in range(_SEARCHES):
            waiting = np.flatnonzero(home < 0)
            if first[waiting].any():
                waiting = waiting[first[waiting]]
            waiting = waiting[np.argsort(lengths[waiting], kind="stable")]
            roomiest = np.argsort(-self._room, kind="stable")
            for place, pack in enumerate(roomiest.tolist()):
                if self._room[pack] <= least or len(waiting) == 0:
                    break
                if self._images[pack] < self._limits.max_images:
                    others = roomiest[place + 1 : place + 1 + _EXCHANGE_WITH]
                    waiting = self._make_room_in(pack, others, home, lengths, waiting)

    def _make_room_in(
        self, pack: int, others: Ints, home: Ints, lengths: Ints, waiting: Ints
    ) -> Ints:
        """Put one image of `waiting` into a pack, by the exchange that leaves the least unused.

        `waiting` is in order of length. Return the images that still wait.
        """
        room = int(self._room[pack])
        is_partner = np.zeros(len(self._room) + 1, dtype=np.bool_)  # the last is home -1
        is_partner[others] = True
        given = _one_of_each(lengths, np.flatnonzero(home == pack))
        taken = _one_of_each(lengths, np.flatnonzero(is_partner[home]))
        freed = lengths[given, None] - lengths[taken]
        freed = np.where((freed > 0) & (freed <= self._room[home[taken]]), freed, 0)
        found = np.searchsorted(lengths[waiting], room + freed, side="right") - 1
        unused = np.where(found >= 0, room + freed - lengths[waiting[found]], room)
        if unused.size == 0 or found.flat[best := int(unused.argmin())] < 0:
            return waiting
        if freed.flat[best] > 0:
            out, into = given[best // len(taken)], taken[best % len(taken)]
            self._room[home[into]] -= freed.flat[best]
            home[out], home[into] = home[into], pack
        home[waiting[found.flat[best]]] = pack
        self._room[pack] = unused.flat[best]
        self._images[pack] += 1
        return np.delete(waiting, found.flat[best])


def _one_of_each(lengths: Ints, images: Ints) -> Ints:
    """Return the first image of each distinct length, in order of length."""
    return images[np.unique(lengths[images], return_index=True)[1]]
