"""A shuffle in O(1) memory: a cipher on indices takes the place of a permuted array.

A Feistel network permutes the power-of-four domain above n; indices that land at n or above are
sent through again until they land inside ("cycle walking", Black and Rogaway 2002). google/grain
also shuffles with a cipher.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from data_pipeline.plan.arrays import Ints
from data_pipeline.plan.random_draws import hashes

_ROUNDS = 6
_WHOLE = 1024
"""Largest domain that is permuted as a whole: walking then only looks indices up."""


def permute(indices: Ints, size: int, key: int) -> Ints:
    """Return the images [n] of `indices` under a keyed permutation of range(size).

    Args:
        indices: [n] values in [0, size).
        size: number of items to permute.
        key: 64-bit key; every key gives an unrelated permutation.
    """
    if size <= 1:
        return indices.copy()
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    rounds = _round_values(half_bits, key)
    domain = 1 << 2 * half_bits
    step: Callable[[Ints], Ints] = partial(_feistel, half_bits=half_bits, rounds=rounds)
    if domain <= _WHOLE:
        step = step(np.arange(domain)).__getitem__
    result = step(indices)
    while (outside := result >= size).any():
        result[outside] = step(result[outside])
    return result


def _round_values(half_bits: int, key: int) -> Ints:
    """Return what each round mixes into one half for each value of the other, [rounds, values].

    There are only as many values as the root of the domain: fewer than indices, as a rule.
    """
    numbers = range(_ROUNDS)
    keys = [(key + number * 0xD1B54A32D192ED03) & ((1 << 64) - 1) for number in numbers]
    words = hashes(np.array(keys, dtype=np.uint64)[:, None], np.arange(1 << half_bits))
    return (words & np.uint64((1 << half_bits) - 1)).astype(np.int64)


def _feistel(values: Ints, half_bits: int, rounds: Ints) -> Ints:
    left, right = values >> half_bits, values & ((1 << half_bits) - 1)
    for mixed in rounds:
        left, right = right, left ^ mixed[right]
    return (left << half_bits) | right
