"""A shuffle in O(1) memory: a cipher on indices takes the place of a permuted array.

A Feistel network permutes the power-of-four domain above n; indices that land at n or above are
sent through again until they land inside ("cycle walking", Black and Rogaway 2002). google/grain
also shuffles with a cipher.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from data_pipeline.plan.random_draws import hashes

_ROUNDS = 6
_TABLE = 1024
"""Largest domain of which the whole permutation is computed: walking then only looks it up."""


def permute(indices: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Return the images [n] of `indices` under a keyed permutation of range(size).

    Args:
        indices: [n] values in [0, size).
        size: number of items to permute.
        key: 64-bit key; every key gives an unrelated permutation.
    """
    if size <= 1:
        return indices.copy()
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    values, domain = indices.astype(np.uint64), 1 << 2 * half_bits
    if domain <= _TABLE:
        table = _feistel(np.arange(domain, dtype=np.uint64), half_bits, key)
        step = table.__getitem__
    else:
        step = partial(_feistel, half_bits=half_bits, key=key)
    result = step(values)
    while (outside := result >= np.uint64(size)).any():
        result[outside] = step(result[outside])
    return result.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half_bits: int, key: int) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_index in range(_ROUNDS):
        round_key = np.uint64((key + round_index * 0xD1B54A32D192ED03) & ((1 << 64) - 1))
        left, right = right, left ^ (hashes(round_key, right) & mask)
    return (left << shift) | right
