"""Which samples each lane reads, in which order: the deal of an epoch, and the stream of a lane.

A lane is one of the P packs of a step. Each epoch the shuffled shards are laid end to end by
expected token mass and cut into P equal runs, lane i taking run i; a shard that is cut is read by
two lanes. Ranks never enter: lane i goes to rank i mod W, whatever W is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.random_draws import Draw, hashes, stream_key
from data_pipeline.shuffle import permute

Ints = NDArray[np.int64]


class Cursor(NamedTuple):
    """Position of a lane in its endless stream: the next sample to deal."""

    epoch: int = 0
    window: int = 0
    """Index of the window of K shards within the lane's run of this epoch."""
    offset: int = 0
    """Samples of this window already dealt."""


class Segment(NamedTuple):
    """A run of consecutive samples of one shard, as sample ids [start, stop)."""

    start: int
    stop: int


@dataclass
class LaneDeal:
    """Deals the samples of every epoch to the lanes; pure, and the same on every rank.

    Args:
        firsts: [S] sample id of the first sample of each shard.
        counts: [S] samples of each shard.
        masses: [S] expected tokens of each shard.
        num_lanes: P.
        window_shards: K, shards whose samples are shuffled together.
        seed: `data.seed`.
    """

    firsts: Ints
    counts: Ints
    masses: NDArray[np.float64]
    num_lanes: int
    window_shards: int
    seed: int

    def __post_init__(self) -> None:
        # One epoch's cuts are kept at a time: all lanes of a rank move through epochs together.
        self._epoch_cuts = lru_cache(maxsize=4)(self._cut_epoch)

    def segments(self, epoch: int, lane: int) -> list[Segment]:
        """Return the samples of `lane` in `epoch`, in shard order, without the empty runs."""
        order, cut_shards, cut_samples = self._epoch_cuts(epoch)
        first, last = int(cut_shards[lane]), int(cut_shards[lane + 1])
        result = []
        for position in range(first, min(last, len(order) - 1) + 1):
            shard = order[position]
            start = int(cut_samples[lane]) if position == first else 0
            stop = int(cut_samples[lane + 1]) if position == last else int(self.counts[shard])
            if start < stop:
                base = int(self.firsts[shard])
                result.append(Segment(base + start, base + stop))
        return result

    def _cut_epoch(self, epoch: int) -> tuple[Ints, Ints, Ints]:
        """Return the shard order, and for each of the P + 1 cuts its shard and sample in it."""
        key = np.uint64(stream_key(Draw.SHARD_ORDER, self.seed, epoch))
        order = np.argsort(hashes(key, np.arange(len(self.counts))), kind="stable")
        masses, counts = np.maximum(self.masses[order], 1e-9), self.counts[order]
        ends = np.cumsum(masses)
        targets = np.linspace(0, ends[-1], self.num_lanes + 1)
        shards = np.minimum(np.searchsorted(ends, targets, side="right"), len(order) - 1)
        share = (targets - (ends - masses)[shards]) / masses[shards]
        samples = np.clip(np.rint(share * counts[shards]), 0, counts[shards]).astype(np.int64)
        samples[0], samples[-1] = 0, counts[-1]
        shards[-1] = len(order) - 1
        return order, shards, samples


@dataclass
class LaneStream:
    """The endless sample stream of one lane, read forwards from any cursor."""

    deal: LaneDeal
    lane: int
    max_epochs: int | None = None

    def __post_init__(self) -> None:
        self._windows = lru_cache(maxsize=2)(self._cut_windows)

    def take(self, cursor: Cursor, limit: int) -> tuple[Ints, Cursor]:
        """Return up to `limit` sample ids of one epoch from `cursor` on, and the cursor after.

        Fewer are returned only where the epoch of this lane ends: the cursor after is then the
        start of the next epoch.
        """
        taken: list[Ints] = []
        epoch, window, offset = cursor
        windows = self._windows(epoch)
        while limit > 0 and window < len(windows):
            segments = windows[window]
            size = sum(segment.stop - segment.start for segment in segments)
            count = min(limit, size - offset)
            taken.append(self._shuffled(segments, size, epoch, window, offset, count))
            limit, offset = limit - count, offset + count
            if offset == size:
                window, offset = window + 1, 0
        if window == len(windows):
            epoch, window, offset = epoch + 1, 0, 0
        ids = np.concatenate(taken) if taken else np.empty(0, dtype=np.int64)
        return ids, Cursor(epoch, window, offset)

    def ended(self, cursor: Cursor) -> bool:
        """Return whether the run has no samples for this lane from `cursor` on."""
        return self.max_epochs is not None and cursor.epoch >= self.max_epochs

    def _cut_windows(self, epoch: int) -> list[list[Segment]]:
        segments = self.deal.segments(epoch, self.lane)
        step = self.deal.window_shards
        return [segments[i : i + step] for i in range(0, len(segments), step)]

    def _shuffled(
        self, segments: list[Segment], size: int, epoch: int, window: int, offset: int, count: int
    ) -> Ints:
        """Return `count` samples of a window in its shuffled order, from `offset` on."""
        key = stream_key(Draw.SAMPLE_ORDER, self.deal.seed, epoch, self.lane, window)
        positions = permute(np.arange(offset, offset + count), size, key)
        lengths = np.array([segment.stop - segment.start for segment in segments])
        ends = np.cumsum(lengths)
        index = np.searchsorted(ends, positions, side="right")
        starts = np.array([segment.start for segment in segments])
        return np.asarray(starts[index] + positions - (ends - lengths)[index])
