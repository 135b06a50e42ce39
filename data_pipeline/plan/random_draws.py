"""Counter-based random numbers: every draw is a pure function of its purpose.

No generator has a state, so a draw depends neither on the rank or worker that makes it nor on
earlier draws; therefore a run can resume anywhere and change its world size exactly.
The mixing function is SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014), written on
arrays because numpy's own counter-based generators cannot take a key per element.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

UInt64s = NDArray[np.uint64]

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


class Draw(IntEnum):
    """The purpose of a draw; each purpose has its own stream."""

    SHARD_ORDER = 0
    SAMPLE_ORDER = 1
    RESOLUTION = 2
    DROP_RATE = 3
    KEPT_PATCHES = 4
    RUN_OFFSET = 5
    CROP_AREA = 6
    CROP_TOP = 7
    CROP_LEFT = 8
    FLIP = 9
    COLOUR = 10
    SUBSET = 11
    RAND_AUGMENT = 12
    MIX = 13


def mix64(values: UInt64s) -> UInt64s:
    """Scramble 64-bit words: a bijection in which each input bit flips half of the output."""
    z = values + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
    return z ^ (z >> np.uint64(31))


def _mix_word(value: int) -> int:
    """Scramble one 64-bit word as `mix64` does, in a tenth of the time of an array of one."""
    z = (value + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK
    return z ^ (z >> 31)


def stream_key(draw: Draw, *parts: int) -> int:
    """Return the 64-bit key of a stream, from its purpose and numbers such as (seed, epoch)."""
    key = int(draw)
    for part in parts:
        key = _mix_word(key ^ (part & _MASK))
    return key


def hashes(keys: UInt64s | np.uint64, counters: NDArray[np.integer]) -> UInt64s:
    """Return one 64-bit word for each (key, counter): [n], `keys` broadcast to `counters` [n]."""
    return mix64(mix64(keys ^ counters.astype(np.uint64)))


def uniforms(keys: UInt64s | np.uint64, counters: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return one float in (0, 1) for each (key, counter), [n]; never 0 or 1 exactly."""
    return ((hashes(keys, counters) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def sample_uniforms(
    draw: Draw,
    seed: int,
    epochs: NDArray[np.integer],
    sample_ids: NDArray[np.integer],
    views: NDArray[np.integer] | None = None,
) -> NDArray[np.float64]:
    """Return the float in (0, 1) that each view of a sample draws for one purpose in its epoch.

    All arrays are [n]. `views` is the number of each view (None: 0); view 0 draws what a sample
    with a single view draws.
    """
    epoch_values = np.unique(epochs)
    keys = np.array([stream_key(draw, seed, int(e)) for e in epoch_values], dtype=np.uint64)
    return uniforms(view_keys(keys[np.searchsorted(epoch_values, epochs)], views), sample_ids)


def view_keys(keys: UInt64s, views: NDArray[np.integer] | None) -> UInt64s:
    """Return the key of each view of a stream, [n]; the key of view 0 is that of the stream."""
    if views is None or not views.any():
        return keys
    return np.where(views == 0, keys, mix64(keys ^ views.astype(np.uint64)))
