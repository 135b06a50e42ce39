"""The samples of each lane in order: the deal of an epoch, and the stream of a lane.

A lane is one of the P packs of a step; to *deal* is to assign samples to lanes. In each epoch the
shuffled shards are laid on a circle, each as long as its expected token mass, and the circle is
cut into P equal runs from a random offset: one run for each lane. A shard that is cut is read by
two lanes. Within its run, a lane shuffles the samples of K shards together: a shuffle *group*.
Ranks do not matter here: lane i goes to rank i mod W, whatever W is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data_pipeline.plan.arrays import Bools, Floats, Ints
from data_pipeline.plan.random_draws import Draw, hashes, stream_key, uniforms
from data_pipeline.plan.shuffle import permute

_CUTS_KEPT = 2**15
"""Shards and cuts to keep, over all epochs that are kept: a few MiB."""


class Cursor(NamedTuple):
    """The position of a lane in its stream of one source: the next sample to deal."""

    epoch: int = 0
    group: int = 0
    """Index of the shuffle group (K shards) within the lane's run of this epoch."""
    offset: int = 0
    """Number of samples of this group already dealt, unusable ones included."""
    images: int = 0
    """Number of usable samples dealt to this lane since the run began."""
    tokens: int = 0
    """Tokens of those samples; counted only if sources are mixed by tokens."""


class Segment(NamedTuple):
    """A run of consecutive samples of one shard, as sample ids [start, stop)."""

    start: int
    stop: int


@dataclass
class LaneDeal:
    """The deal of the samples of every epoch to the lanes: pure, and the same on every rank.

    Args:
        firsts: [S] sample id of the first sample of each shard.
        counts: [S] samples of each shard.
        masses: [S] expected tokens of each shard.
        num_lanes: P.
        group_shards: K, the number of shards whose samples are shuffled together.
        seed: `data.seed`.
        source: index of the source, so that each source has its own order.
    """

    firsts: Ints
    counts: Ints
    masses: Floats
    num_lanes: int
    group_shards: int
    seed: int
    source: int = 0

    def __post_init__(self) -> None:
        # All lanes of a rank move through epochs together, so that four are enough, unless epochs
        # are so short that a lane packs many of them in one window before the next lane does.
        epochs = max(4, _CUTS_KEPT // (len(self.counts) + self.num_lanes))
        self._epoch_cuts = lru_cache(maxsize=epochs)(self._cut_epoch)

    def segments(self, epoch: int, lane: int) -> list[Segment]:
        """Return the samples of `lane` in `epoch`, in shard order, without empty segments."""
        order, cuts, turn = self._epoch_cuts(epoch)
        run = (lane + turn) % self.num_lanes
        pieces = [(cuts[run], cuts[run + 1])]
        if run == self.num_lanes - 1:  # the circle closes: the last run ends where the first begins
            pieces = [(cuts[run], (len(order) - 1, int(self.counts[order[-1]]))), ((0, 0), cuts[0])]
        return [segment for piece in pieces for segment in self._between(order, *piece)]

    def _between(self, order: Ints, begin: tuple[int, int], end: tuple[int, int]) -> list[Segment]:
        """Return the samples between two cuts, each (position in `order`, sample of that shard)."""
        result = []
        for position in range(begin[0], end[0] + 1):
            shard = order[position]
            start = begin[1] if position == begin[0] else 0
            stop = end[1] if position == end[0] else int(self.counts[shard])
            if start < stop:
                base = int(self.firsts[shard])
                result.append(Segment(base + start, base + stop))
        return result

    def _cut_epoch(self, epoch: int) -> tuple[Ints, list[tuple[int, int]], int]:
        """Return the shard order, the P + 1 cuts (the last unused), and the turn of the lanes."""
        key = np.uint64(stream_key(Draw.SHARD_ORDER, self.seed, epoch, self.source))
        order = np.argsort(hashes(key, np.arange(len(self.counts))), kind="stable")
        masses, counts = np.maximum(self.masses[order], 1e-9), self.counts[order]
        ends = np.cumsum(masses)
        # Each epoch has its own offset and turn, so that one shard is not cut alike every time.
        key = np.uint64(stream_key(Draw.RUN_OFFSET, self.seed, epoch, self.source))
        offset, turn = uniforms(key, np.arange(2)) * self.num_lanes
        runs = np.arange(self.num_lanes + 1) + offset % 1
        targets = np.minimum(runs / self.num_lanes, 1) * ends[-1]
        shards = np.minimum(np.searchsorted(ends, targets, side="right"), len(order) - 1)
        share = (targets - (ends - masses)[shards]) / masses[shards]
        samples = np.clip(np.rint(share * counts[shards]), 0, counts[shards]).astype(np.int64)
        return order, list(zip(shards.tolist(), samples.tolist(), strict=True)), int(turn)


@dataclass
class LaneStream:
    """The sample stream of one lane from one source, read forwards from any cursor.

    Args:
        deal: the deal of the source.
        lane: index of the lane.
        usable: returns for sample ids [n] which may be planned, [n]; the others are skipped.
        max_epochs: number of epochs after which the stream ends (None: it never ends).
    """

    deal: LaneDeal
    lane: int
    usable: Callable[[Ints], Bools] | None = None
    max_epochs: int | None = None

    def __post_init__(self) -> None:
        self._groups = lru_cache(maxsize=2)(self._cut_groups)

    def take(self, cursor: Cursor, limit: int) -> tuple[Ints, Cursor]:
        """Return up to `limit` usable sample ids of one epoch from `cursor`, and the cursor after.

        Fewer are returned only if the epoch of this lane ends; the cursor after is then at the
        beginning of the next epoch.
        """
        taken: list[Ints] = []
        epoch, group, offset, images, tokens = cursor
        groups = self._groups(epoch)
        while limit > 0 and group < len(groups):
            segments = groups[group]
            size = sum(segment.stop - segment.start for segment in segments)
            count = min(limit, size - offset)
            ids = self._shuffled(segments, size, epoch, group, offset, count)
            if self.usable is not None:
                ids = ids[self.usable(ids)]
            taken.append(ids)
            limit, offset, images = limit - len(ids), offset + count, images + len(ids)
            if offset == size:
                group, offset = group + 1, 0
        if group == len(groups):
            epoch, group, offset = epoch + 1, 0, 0
        ids = np.concatenate(taken) if taken else np.empty(0, dtype=np.int64)
        return ids, Cursor(epoch, group, offset, images, tokens)

    def ended(self, cursor: Cursor) -> bool:
        """Return whether the stream has no samples from `cursor` on."""
        return self.max_epochs is not None and cursor.epoch >= self.max_epochs

    def _cut_groups(self, epoch: int) -> list[list[Segment]]:
        segments = self.deal.segments(epoch, self.lane)
        step = self.deal.group_shards
        return [segments[i : i + step] for i in range(0, len(segments), step)]

    def _shuffled(
        self, segments: list[Segment], size: int, epoch: int, group: int, offset: int, count: int
    ) -> Ints:
        """Return `count` samples of a group in its shuffled order, from `offset` on."""
        deal = self.deal
        key = stream_key(Draw.SAMPLE_ORDER, deal.seed, epoch, deal.source, self.lane, group)
        positions = permute(np.arange(offset, offset + count), size, key)
        if len(segments) == 1:  # as in short epochs, of which each call below costs a part
            return segments[0].start + positions
        lengths = np.array([segment.stop - segment.start for segment in segments])
        ends = np.cumsum(lengths)
        index = np.searchsorted(ends, positions, side="right")
        starts = np.array([segment.start for segment in segments])
        return np.asarray(starts[index] + positions - (ends - lengths)[index])
