"""Mixing of several weighted sources into one stream; each keeps its own order and epochs.

Each source has a clock: the images (or tokens) it has dealt, divided by its weight. The next
sample comes from the source whose clock is furthest behind ("stride scheduling", Waldspurger and
Weihl 1995). So the shares are exact to one image at every point of a lane, without random draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from data_pipeline.plan.arrays import Floats, Ints
from data_pipeline.plan.lanes import Cursor, LaneStream

CountTokens = Callable[[Ints, Ints, Ints], Ints]
"""Function (sample ids, epochs, samples dealt before) -> tokens of all views; all [n]."""


class Dealt(NamedTuple):
    """Samples dealt to a lane, in order."""

    sample_ids: Ints
    epochs: Ints
    """Epoch of each sample in its own source."""
    seen: Ints
    """n of each sample: P times the number of samples dealt to this lane before it."""

    @staticmethod
    def concatenate(parts: Sequence[Dealt]) -> Dealt:
        """Return the samples of all parts in order."""
        return Dealt(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@dataclass
class LaneMix:
    """The stream of one lane over all its sources.

    Args:
        streams: the lane's stream of each source.
        weights: sampling rate of each source.
        num_lanes: P.
        count_tokens: given if the weights are rates of tokens, not of images.
        longest: most samples to deal at once from several sources: about one pass of the fastest
            source, so that packs do not mix many epochs of a small one.
    """

    streams: Sequence[LaneStream]
    weights: Sequence[float]
    num_lanes: int
    count_tokens: CountTokens | None = None
    longest: int | None = None

    def first_cursors(self) -> tuple[Cursor, ...]:
        """Return the cursor of each source before the first sample of the run."""
        return (Cursor(),) * len(self.streams)

    @property
    def max_epochs(self) -> int | None:
        """Number of epochs after which the stream ends; None if it never ends."""
        return self.streams[0].max_epochs

    def until(self, max_epochs: int | None) -> LaneMix:
        """Return the same stream, but with another limit of epochs."""
        return replace(self, streams=[replace(s, max_epochs=max_epochs) for s in self.streams])

    def ended(self, cursors: Sequence[Cursor]) -> bool:
        """Return whether the stream has no samples left from `cursors` on."""
        return any(s.ended(cursor) for s, cursor in zip(self.streams, cursors, strict=True))

    def deal(self, cursors: Sequence[Cursor], limit: int) -> tuple[Dealt, tuple[Cursor, ...]]:
        """Return the next samples, at most `limit`, and the cursors after them.

        Fewer are returned at the end of an epoch (one source) or after `longest` (several).
        """
        before = sum(cursor.images for cursor in cursors)
        if len(self.streams) == 1:
            ids, cursor = self.streams[0].take(cursors[0], limit)
            epochs = np.full(len(ids), cursors[0].epoch)
            return Dealt(ids, epochs, self._seen(before, len(ids))), (cursor,)
        limit = limit if self.longest is None else min(limit, self.longest)
        if self.count_tokens is None:
            source_of = self._merge([self._image_clock(c.images, limit) for c in cursors], limit)
            return self._collect(cursors, source_of, before)
        source_of = self._merge(
            [self._token_clock(i, cursor, limit, before) for i, cursor in enumerate(cursors)], limit
        )
        dealt, after = self._collect(cursors, source_of, before)
        tokens = self.count_tokens(*dealt)
        spent = np.bincount(source_of, weights=tokens, minlength=len(after)).astype(np.int64)
        counted = (
            cursor._replace(tokens=cursor.tokens + int(spent[i])) for i, cursor in enumerate(after)
        )
        return dealt, tuple(counted)

    def _seen(self, before: int, count: int) -> Ints:
        return self.num_lanes * np.arange(before, before + count)

    def _image_clock(self, dealt: int, limit: int) -> Floats:
        return np.arange(dealt, dealt + limit, dtype=np.float64) + 0.5

    def _token_clock(self, source: int, cursor: Cursor, limit: int, before: int) -> Floats:
        """Return the middle of each of the next samples on the token clock of a source.

        Tokens are counted as if this source came first, although the number of images before it
        changes the drop rate a little. The clock itself advances by the tokens really dealt, so no
        error adds up.
        """
        assert self.count_tokens is not None
        ids, epochs, _ = self._take(source, cursor, limit)
        tokens = self.count_tokens(ids, epochs, np.full(limit, self.num_lanes * before))
        middles: Floats = cursor.tokens + np.cumsum(tokens) - 0.5 * tokens
        return middles

    def _merge(self, clocks: Sequence[Floats], limit: int) -> Ints:
        """Return the source of each of the next `limit` samples, in order of their clocks."""
        times = np.concatenate([c / w for c, w in zip(clocks, self.weights, strict=True)])
        source_of = np.repeat(np.arange(len(clocks)), limit)
        return source_of[np.argsort(times, kind="stable")[:limit]]

    def _collect(
        self, cursors: Sequence[Cursor], source_of: Ints, before: int
    ) -> tuple[Dealt, tuple[Cursor, ...]]:
        ids, epochs = np.empty_like(source_of), np.empty_like(source_of)
        after = []
        for source, cursor in enumerate(cursors):
            mine = np.flatnonzero(source_of == source)
            ids[mine], epochs[mine], advanced = self._take(source, cursor, len(mine))
            after.append(advanced)
        return Dealt(ids, epochs, self._seen(before, len(ids))), tuple(after)

    def _take(self, source: int, cursor: Cursor, count: int) -> tuple[Ints, Ints, Cursor]:
        """Take exactly `count` samples of a source, over as many epochs as it needs."""
        ids, epochs = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        while count > 0:
            taken, after = self.streams[source].take(cursor, count)
            ids.append(taken)
            epochs.append(np.full(len(taken), cursor.epoch))
            cursor, count = after, count - len(taken)
        return np.concatenate(ids), np.concatenate(epochs), cursor
