"""The matrix products of a training step run by themselves: the rate that zeta is measured by.

Forward and backward of every linear layer on the concatenated tokens, and of attention image by
image (two products forward, four backward; recomputing the weights is not counted as useful work).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tests.benchmarks.contestants import CLASSES, DEPTH, HEADS, HIDDEN, WIDTH
from tests.benchmarks.workload import PATCH

_BLOCK = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
_TOKEN_LAYERS = ((3 * PATCH**2, WIDTH), *_BLOCK * DEPTH, (WIDTH, 2 * WIDTH))
_IMAGE_LAYERS = ((WIDTH, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH), (WIDTH, CLASSES))


def useful_flops(lengths: list[int]) -> int:
    """Floating-point operations of forward and backward that a step on these images needs.

    The patch embedding has no gradient with respect to the pixels.
    """
    tokens, images = sum(lengths), len(lengths)
    linear = sum(6 * tokens * i * o for i, o in _TOKEN_LAYERS)
    linear -= 2 * tokens * _TOKEN_LAYERS[0][0] * _TOKEN_LAYERS[0][1]
    linear += sum(6 * images * i * o for i, o in _IMAGE_LAYERS)
    attention = DEPTH * sum(12 * WIDTH * length**2 for length in lengths)
    pool = 12 * WIDTH * tokens
    return linear + attention + pool


class Products:
    """Call it to run the products of one step once, on operands made beforehand."""

    def __init__(self, lengths: list[int], dtype: torch.dtype) -> None:
        tokens, width = sum(lengths), WIDTH // HEADS
        widths = {w for layer in (*_TOKEN_LAYERS, *_IMAGE_LAYERS) for w in layer}
        self.tokens = {w: torch.randn(tokens, w, dtype=dtype) for w in widths}
        self.images = {w: torch.randn(len(lengths), w, dtype=dtype) for w in widths}
        self.weights = [torch.randn(o, i, dtype=dtype) for i, o in _TOKEN_LAYERS]
        self.image_weights = [torch.randn(o, i, dtype=dtype) for i, o in _IMAGE_LAYERS]
        self.heads = [torch.randn(HEADS, n, width, dtype=dtype) for n in lengths]
        self.scores = [torch.randn(HEADS, n, n, dtype=dtype) for n in lengths]

    def __call__(self) -> None:
        for first, w in enumerate(self.weights):
            x, grad = self.tokens[w.shape[1]], self.tokens[w.shape[0]]
            F.linear(x, w)
            if first:
                grad @ w
            grad.t() @ x
        for w in self.image_weights:
            x, grad = self.images[w.shape[1]], self.images[w.shape[0]]
            F.linear(x, w), grad @ w, grad.t() @ x
        for _ in range(DEPTH):
            for x, p in zip(self.heads, self.scores, strict=True):
                x @ x.mT, p @ x  # forward
                x @ x.mT, p.mT @ x, p @ x, p.mT @ x  # backward
