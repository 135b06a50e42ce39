"""The packs of one lane, window by window, and the small state from which it goes on anywhere."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.plan.arrays import Ints
from data_pipeline.plan.lanes import Cursor
from data_pipeline.plan.mixing import Dealt, LaneMix
from data_pipeline.plan.packing import PackLimits, image_costs, num_full_packs, pack_window

_UNEVEN_PACKS = range(12, 48)
"""So many packs in a window are too few to have all costs, and enough to care for."""
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd


@dataclass(frozen=True)
class PackPlan:
    """The images of one pack (or window); arrays of [n] in order."""

    sample_ids: Ints
    epochs: Ints
    seen: Ints
    """Images dealt before each one, over all lanes: the n of schedules."""
    rows: Ints
    columns: Ints
    """Grid of patches that the image is resized to, before dropping."""
    keep: Ints
    """Patches kept of rows * columns."""
    lengths: Ints
    """Tokens of the budget used: kept patches and prefix tokens."""
    crops: NDArray[np.float64]
    """Share of each side of the image that its crop keeps; 1 is the whole image."""
    shrunk: NDArray[np.bool_]
    """Whether the image was made smaller than drawn, to fit into the budget."""

    def select(self, index: Ints | slice) -> PackPlan:
        """Return some of the images."""
        return PackPlan(*(getattr(self, field.name)[index] for field in fields(self)))

    @staticmethod
    def concatenate(parts: list[PackPlan]) -> PackPlan:
        """Return the images of all parts in order."""
        names = [field.name for field in fields(PackPlan)]
        return PackPlan(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


@dataclass(frozen=True)
class LaneState:
    """Where a lane stands: the start of its pack window, and the packs taken from that window.

    What a window leaves over is placed first in the next one, so leftovers always stem from the
    window dealt last: where that window began, and which of its samples were left, says it all.
    """

    origin: tuple[Cursor, ...] = ()
    """Per source, where the window dealt last began; () is the start of the run."""
    dealt: int = 0
    """Samples dealt from `origin` up to where the next window begins."""
    carry: tuple[int, ...] = ()
    """Which of those were left over, by position."""
    step: int = 0
    """Packs that this lane gave before the next window."""
    packs_taken: int = 0
    """Packs taken from the next window."""
    max_epochs: int | None = None
    """Where the run was to end when those packs were made: how a last window is packed depends on
    it, so a run that goes on under another limit first finishes this window as it was."""

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain lists, ints and text.

        It is below 1 KB with up to 4 sources whatever is left over, and with dozens as it goes.
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
        """Read what `to_json` wrote."""
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
    """How the lanes of a plan fill their packs."""

    size: Callable[[Dealt], PackPlan]
    """Draws the size of each dealt sample."""
    limits: PackLimits
    cost_dim: int
    pack_window: int


class LanePacker:
    """Iterates over the packs of one lane; `state` may be saved after any pack.

    Args:
        mix: the lane's stream of samples.
        rules: how they become packs.
        state: where to go on; None is the start of the run.
    """

    def __init__(self, mix: LaneMix, rules: WindowRules, state: LaneState | None = None) -> None:
        self._mix, self._rules = mix, rules
        self._start = state or LaneState()
        """State at the start of the current window."""
        self._cursors, self._carry = self._replay(self._start)
        self._packs: list[PackPlan] = []
        self._taken = 0
        self._next = (self._start, self._cursors, self._carry)
        """State, cursors and leftovers at the start of the next window."""
        self.epoch = min((cursor.epoch for cursor in self._cursors), default=0)
        self._window_epochs = mix.max_epochs
        """Epochs of the run when the waiting packs were made."""
        if self._start.packs_taken:
            taken, self._start = self._start.packs_taken, self._at_window(self._start)
            self._window_epochs = (state or self._start).max_epochs
            self._mix = mix.until(self._window_epochs)
            self._next_window()
            self._mix, self._taken = mix, taken

    def __iter__(self) -> Iterator[PackPlan]:
        while (pack := self.next_pack()) is not None:
            yield pack

    @property
    def state(self) -> LaneState:
        """State after the packs returned so far; a lane restored from it returns the next one."""
        start = self._start
        epochs = self._window_epochs if self._taken else None
        return LaneState(start.origin, start.dealt, start.carry, start.step, self._taken, epochs)

    @property
    def cursors(self) -> tuple[Cursor, ...]:
        """Per source, where the window of the next pack begins, or began."""
        return self._cursors

    @property
    def carry(self) -> PackPlan | None:
        """What the window before left over."""
        return self._carry

    def next_pack(self) -> PackPlan | None:
        """Return the next pack of this lane, or None once its stream has ended."""
        if not self._fill():
            return None
        pack = self._packs[self._taken]
        self._taken += 1
        self.epoch = int(pack.epochs.min())
        if self._taken == len(self._packs):  # a finished window is named by where the next starts
            (self._start, self._cursors, self._carry), self._packs, self._taken = self._next, [], 0
            self._window_epochs = self._mix.max_epochs
        return pack

    def has_more(self) -> bool:
        """Return whether `next_pack` would return a pack."""
        return self._fill()

    def _fill(self) -> bool:
        """Make sure that a pack is waiting; return False once the stream has ended."""
        while not self._packs:
            if self._mix.ended(self._cursors) and self._carry is None:
                return False
            self._next_window()
            if not self._packs:  # not one full pack in a whole window: deal on
                self._start, self._cursors, self._carry = self._next
        return True

    def _next_window(self) -> None:
        """Deal and pack the window that `_start` stands before; set `_packs` and `_next`."""
        rules, cursors = self._rules, self._cursors
        parts = [] if self._carry is None else [self._carry]
        carried, dealt = len(self._start.carry), 0
        while not self._mix.ended(cursors) and dealt < rules.pack_window:
            samples, cursors = self._mix.deal(cursors, rules.pack_window - dealt)
            parts.append(rules.size(samples))
            dealt += len(samples.sample_ids)
            # The end of an epoch ends the window, unless two epochs make packs more even, or one
            # does not fill a pack. Of tiny sets, each epoch is better kept to itself.
            full = num_full_packs(np.concatenate([p.lengths for p in parts]), rules.limits)
            epochs = len(parts) - bool(carried)
            if full and not (epochs == 1 and full in _UNEVEN_PACKS):
                break
        if carried + dealt == 0:  # the run ended, and none of its last samples was usable
            self._packs, self._next = [], (self._start, cursors, None)
            return
        images = PackPlan.concatenate(parts)
        costs = image_costs(images.lengths, rules.cost_dim)
        packs, leftovers = pack_window(
            images.lengths,
            costs,
            rules.limits,
            num_first=carried,
            flush=self._mix.ended(cursors),
        )
        order = step_order([float(costs[pack].sum()) for pack in packs], self._start.step)
        self._packs, self._taken = [images.select(packs[i]) for i in order], 0
        step = self._start.step + len(packs)
        if len(leftovers) == 0:
            self._next = (LaneState(cursors, 0, (), step), cursors, None)
            return
        assert leftovers[0] >= carried, "what was left over before is placed first"
        carry = tuple((leftovers - carried).tolist())
        after = LaneState(self._cursors, dealt, carry, step)
        self._next = (after, cursors, images.select(leftovers))

    def _replay(self, state: LaneState) -> tuple[tuple[Cursor, ...], PackPlan | None]:
        """Deal the window before `state` again; return the cursors after it and its leftovers."""
        cursors = state.origin or self._mix.start()
        parts, dealt = list[Dealt](), 0
        while dealt < state.dealt:
            limit = min(state.dealt, self._rules.pack_window) - dealt
            samples, cursors = self._mix.deal(cursors, limit)
            parts.append(samples)
            dealt += len(samples.sample_ids)
        if not state.carry:
            return cursors, None
        carry = np.array(state.carry)
        left = Dealt(*(np.concatenate(column)[carry] for column in zip(*parts, strict=True)))
        return cursors, self._rules.size(left)

    @staticmethod
    def _at_window(state: LaneState) -> LaneState:
        return LaneState(state.origin, state.dealt, state.carry, state.step)


def step_order(costs: list[float], first_step: int) -> list[int]:
    """Return the order in which a lane gives the packs of a window, from `first_step` on.

    Packs that hold one very large image cost more than others whatever is packed with them. So
    each step asks all lanes for the pack at one quantile of their windows' costs: ranks then wait
    little for each other, wherever the windows of their lanes begin. The quantiles of successive
    steps are multiples of the golden ratio, which are spread evenly over any range of steps.
    """
    steps = np.arange(first_step, first_step + len(costs), dtype=np.uint64)
    rank_of_step = np.argsort(np.argsort(steps * np.uint64(_GOLDEN)))
    cheapest_first = np.argsort(np.array(costs), kind="stable")
    return [int(i) for i in cheapest_first[rank_of_step]]
