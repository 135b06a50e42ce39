"""Mixup and CutMix on packs: an image shows part of the next one of its pack, and learns its class.

Mixup (Zhang et al. 2018) blends two images, CutMix (Yun et al. 2019) pastes a box of one into the
other. The plan knows who lies in a pack, so the other image is the next one of the same pack, and
after the last one the first; it is the same on any number of ranks, and when a pack is made again.
It is read and decoded for its own place in the pack anyway. The images differ in size: the largest
middle part of the other with the aspect ratio of the image is resized to the image's size. Every
draw is a pure function of its key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.augmentation import MixConfig
from data_pipeline.plan.arrays import Ints
from data_pipeline.plan.random_draws import uniforms
from zeta.models.resizing import Window, cut

Pixels = NDArray[np.uint8]
"""[h, w, 3] RGB."""


class Mix(NamedTuple):
    """How an image is mixed with another one."""

    pastes: bool
    """Paste a box of the other image (CutMix), in the place of a blend (mixup)."""
    share: float
    """Share of the image's own pixels."""
    top: float = 0.0
    """Place of the box, from 0 (at the top) to 1 (at the bottom)."""
    left: float = 0.0
    """Place of the box, from 0 (at the left) to 1 (at the right)."""

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (top, left, bottom, right) in pixels of the box in an image of a size."""
        side = (1 - self.share) ** 0.5
        rows, columns = round(side * height), round(side * width)
        top = round(self.top * (height - rows))
        left = round(self.left * (width - columns))
        return top, left, top + rows, left + columns


def draw_mixes(config: MixConfig, keys: NDArray[np.uint64]) -> list[Mix | None]:
    """Return how each image is mixed, if it is: a pure function of its key [n]."""
    # A third of a second, which runs without mixing need not wait for.
    from scipy.special import betaincinv

    def draw(number: int) -> NDArray[np.float64]:
        return uniforms(keys, np.full(len(keys), number))

    pastes = np.full(len(keys), config.cutmix_alpha > 0)
    if config.mixup_alpha and config.cutmix_alpha:
        pastes = draw(1) < config.switch_probability
    alphas = np.where(pastes, config.cutmix_alpha, config.mixup_alpha)
    shares = betaincinv(alphas, alphas, draw(2))  # by inversion: alphas differ, draws are one each
    columns = (pastes, shares, draw(3), draw(4))
    drawn = [Mix(*values) for values in zip(*(c.tolist() for c in columns), strict=True)]
    mixes = draw(0) < config.probability
    return [mix if mixed else None for mix, mixed in zip(drawn, mixes.tolist(), strict=True)]


def mix_rows(
    pictures: Sequence[Pixels | None], mixes: Sequence[Mix | None], views: int
) -> Iterator[tuple[Pixels | None, int]]:
    """Yield each row of a pack as it is shown, and the row that is mixed into it (-1: none).

    An image whose partner could not be decoded is shown alone, and so is the only one of a pack.

    Args:
        pictures: the image of each row, None for one that could not be decoded.
        mixes: how each row is mixed.
        views: rows of one image; a view is mixed with the same view of the next image.
    """
    for row, (own, mix) in enumerate(zip(pictures, mixes, strict=True)):
        partner = (row + views) % len(pictures)
        other = pictures[partner]
        if own is None or other is None or mix is None or partner == row:
            yield own, -1
        else:
            yield mixed(own, other, mix), partner


def mixed(own: Pixels, other: Pixels, mix: Mix) -> Pixels:
    """Return an image mixed with another one, of the first one's size."""
    size = (own.shape[0], own.shape[1])
    whole = Window(0, 0, other.shape[0], other.shape[1])
    if not other.flags.writeable:  # Pillow's are not, and torch warns of those
        other = other.copy()
    other = cut(other, whole.middle(size), size, snap=True)
    if mix.pastes:
        top, left, bottom, right = mix.box(*size)
        pasted = own.copy()
        pasted[top:bottom, left:right] = other[top:bottom, left:right]
        return pasted
    share = np.float32(mix.share)
    return np.rint(own * share + other * (1 - share)).astype(np.uint8)


def own_share(mix: Mix, size: tuple[int, int], y: Ints, x: Ints, side: int) -> float:
    """Return the share of an image's own pixels in its kept patches.

    Args:
        mix: how it was mixed.
        size: (height, width) in pixels.
        y, x: [n] row and column of each kept patch.
        side: side of a patch in pixels.
    """
    if not mix.pastes:
        return mix.share
    top, left, bottom, right = mix.box(*size)

    def overlap(places: Ints, low: int, high: int) -> Ints:
        """Return the pixels of each patch, along one side, that the box covers."""
        starts = places * side
        ends = np.minimum(starts + side, high)
        covered: Ints = np.clip(ends - np.maximum(starts, low), 0, side)
        return covered

    pasted = (overlap(y, top, bottom) * overlap(x, left, right)).sum()
    return 1 - float(pasted) / (len(y) * side * side)
