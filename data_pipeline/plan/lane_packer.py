"""The packs of one lane, one pack window at a time, and the small state it resumes from.

A *window* is the run of samples that a lane packs together, `data.pack_window` of them at most.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline.plan.arrays import Bools, Floats, Ints
from data_pipeline.plan.lanes import Cursor
from data_pipeline.plan.mixing import Dealt, LaneMix
from data_pipeline.plan.packing import PackLimits, image_costs, num_full_packs, pack_window

_UNEVEN_PACKS = range(12, 48)
"""With 12-47 packs a window holds too few cost quantiles; merge two epochs. (With fewer, each epoch
of a tiny set is better kept to itself.)"""
_MOST_DEALS = 64
"""Most deals that are sized at once."""
Number = TypeVar("Number", np.int64, np.float64)
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd


@dataclass(frozen=True)
class PackPlan:
    """The images of one pack (or of a whole window), as arrays of [n] in order."""

    sample_ids: Ints
    epochs: Ints
    seen: Ints
    """Number of images dealt before each one, over all lanes: the n of schedules."""
    rows: Ints
    columns: Ints
    """Columns (and `rows`) of the patch grid that the image is resized to, before dropping."""
    keep: Ints
    """Number of patches kept, of rows * columns."""
    lengths: Ints
    """Tokens that the image takes of the budget: kept patches and prefix tokens."""
    crops: Floats
    """Share of each side that the crop keeps, in (0, 1]; 1 keeps the whole image."""
    shrunk: Bools
    """True for an image that was made smaller than drawn, to fit into the budget."""
    views: Ints
    """Number of the view of its sample, from 0. Each view is an image, and those of a sample follow
    one another."""

    @property
    def num_samples(self) -> int:
        """Number of samples that these images are views of."""
        return int((self.views == 0).sum())

    def select(self, index: Ints | slice) -> PackPlan:
        """Return the images at `index`, in that order."""
        return PackPlan(*(getattr(self, field.name)[index] for field in fields(self)))

    @staticmethod
    def concatenate(parts: list[PackPlan]) -> PackPlan:
        """Return the images of all parts in order."""
        names = [field.name for field in fields(PackPlan)]
        return PackPlan(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


@dataclass(frozen=True)
class LaneState:
    """The position of a lane: where its window begins, and the packs taken from that window.

    Leftovers of a window are placed first in the next one, so they always come from the window
    dealt last. The beginning of that window and the indices of its leftovers are therefore enough.
    """

    origin: tuple[Cursor, ...] = ()
    """Cursor of each source where the window dealt last began; () is the beginning of the run."""
    dealt: int = 0
    """Number of samples dealt between `origin` and the next window."""
    carry: tuple[int, ...] = ()
    """Positions of the leftovers among those samples."""
    step: int = 0
    """Number of packs that this lane returned before the next window."""
    packs_taken: int = 0
    """Number of packs taken from the next window."""
    max_epochs: int | None = None
    """Epoch limit under which those packs were made. The packing of a last window depends on it, so
    a run that continues under another limit first finishes this window under the old one."""

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain lists, ints and text.

        With up to 4 sources it stays below 1 KB, whatever is left over; each further source adds
        one cursor.
        """
        marks = np.zeros(self.dealt, dtype=np.bool_)
        marks[list(self.carry)] = True
        packed = zlib.compress(np.packbits(marks).tobytes(), 9) if self.carry else b""
        return {
            "origin": [list(cursor) for cursor in self.origin],
            "dealt": self.dealt,
            "carry": base64.b85encode(packed).decode("ascii"),
            "step": self.step,
            "packs_taken": self.packs_taken,
            **({} if self.max_epochs is None else {"max_epochs": self.max_epochs}),
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> LaneState:
        """Return the state that `to_json` wrote."""
        packed = base64.b85decode(state["carry"])
        marks = np.frombuffer(zlib.decompress(packed) if packed else b"", dtype=np.uint8)
        return cls(
            tuple(Cursor(*cursor) for cursor in state["origin"]),
            int(state["dealt"]),
            tuple(np.flatnonzero(np.unpackbits(marks)).tolist()),
            int(state["step"]),
            int(state["packs_taken"]),
            state.get("max_epochs"),
        )


@dataclass(frozen=True)
class WindowRules:
    """The rules by which the lanes of a plan fill their packs."""

    size: Callable[[Dealt], PackPlan]
    """Function that draws the size of each dealt sample."""
    limits: PackLimits
    cost_dim: int
    """Width d of the model in the cost of an image."""
    pack_window: int
    """Most samples of a window."""
    views: int = 1
    """Number of images that `size` returns for each sample, one after the other."""

    @property
    def sample_limits(self) -> PackLimits:
        """The limits of a pack, counted in samples instead of images."""
        return PackLimits(self.limits.token_budget, self.limits.max_images // self.views)

    def images_of(self, samples: Ints) -> Ints:
        """Return the positions of all images of the samples at these positions, in order."""
        return (samples[:, None] * self.views + np.arange(self.views)).ravel()

    def by_sample(self, values: NDArray[Number]) -> NDArray[Number]:
        """Return the sum over the images of each sample."""
        return np.asarray(values.reshape(-1, self.views).sum(axis=1))


@dataclass(frozen=True)
class _Window:
    """A window that has been packed."""

    packs: list[PackPlan]
    """In the order in which the lane returns them."""
    after: tuple[LaneState, tuple[Cursor, ...], PackPlan | None]
    """State, cursors and leftovers at the beginning of the window that follows."""


class LanePacker:
    """An iterator over the packs of one lane; `state` may be saved after any pack.

    Args:
        mix: the lane's stream of samples.
        rules: the rules by which samples become packs.
        state: the position to continue from; None is the beginning of the run.
    """

    def __init__(self, mix: LaneMix, rules: WindowRules, state: LaneState | None = None) -> None:
        self._mix, self._rules = mix, rules
        self._window = state or LaneState()
        """State at the beginning of the current window."""
        self._cursors, self._carry = self._replay(self._window)
        self._packs: list[PackPlan] = []
        self._taken = 0
        self._ahead: _Window | None = None
        """The next window, if it has been packed already."""
        self._next = (self._window, self._cursors, self._carry)
        """State, cursors and leftovers at the beginning of the next window."""
        self.epoch = min((cursor.epoch for cursor in self._cursors), default=0)
        self._window_epochs = mix.max_epochs
        """Epoch limit of the run when the waiting packs were made."""
        if self._window.packs_taken:
            taken, self._window = self._window.packs_taken, self._at_window(self._window)
            self._window_epochs = (state or self._window).max_epochs
            self._mix = mix.until(self._window_epochs)
            self._next_window()
            self._mix, self._taken = mix, taken

    def __iter__(self) -> Iterator[PackPlan]:
        while (pack := self.next_pack()) is not None:
            yield pack

    @property
    def state(self) -> LaneState:
        """State after the packs returned so far; a lane restored from it returns the next one."""
        window = self._window
        epochs = self._window_epochs if self._taken else None
        return LaneState(
            window.origin, window.dealt, window.carry, window.step, self._taken, epochs
        )

    @property
    def cursors(self) -> tuple[Cursor, ...]:
        """Cursor of each source where the window of the next pack begins."""
        return self._cursors

    @property
    def carry(self) -> PackPlan | None:
        """The leftovers of the previous window, or None."""
        return self._carry

    def next_pack(self) -> PackPlan | None:
        """Return the next pack of this lane, or None once its stream has ended."""
        if not self._fill():
            return None
        pack = self._packs[self._taken]
        self._taken += 1
        self.epoch = int(pack.epochs.min())
        if self._taken == len(self._packs):  # a finished window: from here on, the next one
            (self._window, self._cursors, self._carry), self._packs, self._taken = self._next, [], 0
            self._window_epochs = self._mix.max_epochs
        return pack

    def has_more(self) -> bool:
        """Return whether `next_pack` would return a pack."""
        return self._fill()

    def plan_ahead(self, share: float) -> None:
        """Pack the next window now, if `share` of the packs of this one have been returned.

        This changes no pack. It lets the lanes of a run do so at different steps, which would
        otherwise all stop a step together.
        """
        _, cursors, carry = self._next
        ended = self._mix.ended(cursors) and carry is None
        if self._ahead is None and self._taken > share * len(self._packs) and not ended:
            self._ahead = self._packed(*self._next)

    def _fill(self) -> bool:
        """Make sure that a pack is waiting; return False once the stream has ended."""
        while not self._packs:
            if self._mix.ended(self._cursors) and self._carry is None:
                return False
            self._next_window()
            if not self._packs:  # a whole window without one full pack: deal another
                self._window, self._cursors, self._carry = self._next
        return True

    def _next_window(self) -> None:
        """Set `_packs` and `_next` to those of the window that begins at `_window`."""
        window = self._ahead or self._packed(self._window, self._cursors, self._carry)
        self._packs, self._taken, self._ahead = window.packs, 0, None
        self._next = window.after

    def _packed(
        self, state: LaneState, first: tuple[Cursor, ...], carry: PackPlan | None
    ) -> _Window:
        """Deal and pack the window that begins at `state`, with these cursors and leftovers."""
        rules, carried = self._rules, len(state.carry)
        new, dealt, cursors = self._deal_window(first, carry, carried)
        parts = new if carry is None else [carry, *new]
        if carried + dealt == 0:  # the run ended and none of its last samples was usable
            return _Window([], (state, cursors, None))
        images = PackPlan.concatenate(parts)
        # A sample is placed as a whole: its views lie in one pack.
        costs = rules.by_sample(image_costs(images.lengths, rules.cost_dim))
        packs, leftovers = pack_window(
            rules.by_sample(images.lengths),
            costs,
            rules.sample_limits,
            num_first=carried,
            flush=self._mix.ended(cursors),
        )
        order = step_order([float(costs[pack].sum()) for pack in packs], state.step)
        ordered = [images.select(rules.images_of(packs[i])) for i in order]
        step = state.step + len(packs)
        if len(leftovers) == 0:
            return _Window(ordered, (LaneState(cursors, 0, (), step), cursors, None))
        assert leftovers[0] >= carried, "leftovers of the previous window are placed first"
        left = tuple((leftovers - carried).tolist())
        after = LaneState(first, dealt, left, step)
        return _Window(ordered, (after, cursors, images.select(rules.images_of(leftovers))))

    def _deal_window(
        self, cursors: tuple[Cursor, ...], carry: PackPlan | None, carried: int
    ) -> tuple[list[PackPlan], int, tuple[Cursor, ...]]:
        """Deal the samples of a window from `cursors` on, beside `carried` leftovers.

        The deals that a pack probably still needs are sized together: of a few images each, numpy's
        calls cost more than the work.

        Returns:
            The new images, the number of their samples, and the cursors after them.
        """
        rules, limits = self._rules, self._rules.sample_limits
        tokens = 0 if carry is None else int(carry.lengths.sum())
        parts, dealt, epochs, at_once = list[PackPlan](), 0, 0, 1
        while deals := self._deals(cursors, rules.pack_window - dealt, at_once):
            images = rules.size(Dealt.concatenate([deal for deal, _ in deals]))
            counts = [len(deal.sample_ids) for deal, _ in deals]
            ends = rules.views * np.cumsum(counts)
            sums = np.concatenate([[0], images.lengths.cumsum()])[ends].tolist()
            for number, (count, end, new, (_, after)) in enumerate(
                zip(counts, ends.tolist(), sums, deals, strict=True), start=1
            ):
                dealt, cursors = dealt + count, after
                # The end of an epoch ends the window, unless one epoch does not fill a pack, or has
                # a number of packs that two epochs together balance better.
                full = num_full_packs(tokens + new, carried + dealt, limits)
                if full and not (epochs + number == 1 and full in _UNEVEN_PACKS):
                    return [*parts, images.select(slice(end))], dealt, cursors
            parts.append(images)
            tokens, epochs = tokens + sums[-1], epochs + len(deals)
            missing = limits.token_budget - tokens, limits.max_images - carried - dealt
            found = sums[-1], sum(counts)
            passes = min(m / max(n, 1) for m, n in zip(missing, found, strict=True))
            at_once = min(max(1, math.ceil(passes * len(deals))), _MOST_DEALS)
        return parts, dealt, cursors

    def _deals(
        self, cursors: tuple[Cursor, ...], limit: int, most: int
    ) -> list[tuple[Dealt, tuple[Cursor, ...]]]:
        """Return at most `most` deals, of `limit` samples together, and the cursors after each."""
        deals = list[tuple[Dealt, tuple[Cursor, ...]]]()
        while len(deals) < most and limit > 0 and not self._mix.ended(cursors):
            deal, cursors = self._mix.deal(cursors, limit)
            deals.append((deal, cursors))
            limit -= len(deal.sample_ids)
        return deals

    def _replay(self, state: LaneState) -> tuple[tuple[Cursor, ...], PackPlan | None]:
        """Deal the window before `state` again; return the cursors after it, and its leftovers."""
        cursors = state.origin or self._mix.first_cursors()
        parts, dealt = list[Dealt](), 0
        while dealt < state.dealt:
            limit = min(state.dealt, self._rules.pack_window) - dealt
            samples, cursors = self._mix.deal(cursors, limit)
            parts.append(samples)
            dealt += len(samples.sample_ids)
        if not state.carry:
            return cursors, None
        carry = np.array(state.carry)
        left = Dealt(*(column[carry] for column in Dealt.concatenate(parts)))
        return cursors, self._rules.size(left)

    @staticmethod
    def _at_window(state: LaneState) -> LaneState:
        return LaneState(state.origin, state.dealt, state.carry, state.step)


def step_order(costs: list[float], first_step: int) -> list[int]:
    """Return the order in which a lane returns the packs of a window, from `first_step` on.

    A pack with one very large image costs more than others, whatever is packed with it. So each
    step takes from all lanes the pack at the same quantile of cost in their windows: ranks then
    wait little for each other, wherever the windows of their lanes begin. The quantiles of
    successive steps are multiples of the golden ratio, spread evenly over any range of steps.

    Args:
        costs: [packs] cost of each pack.
        first_step: step of the first pack returned.

    Returns:
        Indices into `costs`, in order of the steps.
    """
    steps = np.arange(first_step, first_step + len(costs), dtype=np.uint64)
    rank_of_step = np.argsort(np.argsort(steps * np.uint64(_GOLDEN)))
    cheapest_first = np.argsort(np.array(costs), kind="stable")
    return [int(i) for i in cheapest_first[rank_of_step]]
