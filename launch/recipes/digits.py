"""The images of `zeta demo`: scanned digits, rendered as JPEGs of many sizes and shapes.

The scans are the 1,797 handwritten digits that scikit-learn ships (the test part of the UCI
"Optical Recognition of Handwritten Digits" set, 13 writers). Each scan is 8 x 8 pixels with 17
grey levels, so a rendering of 96 x 64 pixels holds no more detail than one of 24 x 24: the demo
shows that variable sizes and shapes are read, packed and learned, not that a larger image is
better. Train and validation share no scan, yet they share writers, whom the set does not name.
"""

from __future__ import annotations

import hashlib
import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

CLASS_NAMES = tuple(str(digit) for digit in range(10))
MIN_SIDE, MAX_SIDE = 24, 96
"""Shortest and longest side of a rendering, in pixels."""
MAX_ASPECT = 2.0
"""Largest ratio of the longest to the shortest side of a rendering."""
VAL_SHARE = 0.2
"""Share of the scans of each class that is held out."""
JPEG_QUALITY = 90

_SIDE = 8  # pixels of a scan's side
_PAPER = 8  # empty cells around a scan, so that any canvas cut around it is paper


@dataclass(frozen=True)
class Scan:
    """One scanned digit."""

    index: int
    """Row in `sklearn.datasets.load_digits`."""
    label: int
    pixels: bytes
    """8 x 8 ink levels, row-major, each 0 (paper) to 16 (full ink)."""


def render_split(
    split: str, *, seed: int, renderings: int = 1
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the WebDataset samples of a split: ``(key, {"jpg": ..., "cls": b"7"})``.

    The order is shuffled by hash, so that consecutive samples, and so shards, mix the classes.
    Keys name scan and rendering: ``scan0042_3``. The same arguments give the same samples, byte
    for byte with the same Pillow.

    Args:
        split: ``train`` or ``val``.
        seed: decides which scans are held out, and every size, shape and placement.
        renderings: JPEGs of each training scan, all different. Validation has one of each scan,
            so that every held-out scan counts once.

    Raises:
        ValueError: unknown split, `renderings` below 1, or above 1 for the validation split.
    """
    if renderings < 1 or (split == "val" and renderings != 1):
        raise ValueError(
            f"renderings is {renderings} for split {split!r}; the training split takes at least 1, "
            "the validation split exactly 1"
        )
    jobs = [(scan, n) for scan in split_scans(split, seed=seed) for n in range(renderings)]
    jobs.sort(key=lambda job: _hash(f"order/{seed}/{job[0].index}/{job[1]}"))
    for scan, n in jobs:
        members = {"jpg": render(scan, seed=seed, rendering=n), "cls": b"%d" % scan.label}
        yield f"scan{scan.index:04d}_{n}", members


def split_scans(split: str, *, seed: int) -> list[Scan]:
    """Return the scans of `split` (train or val); the same share of each class is held out.

    Raises:
        ValueError: unknown split.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}; choose one of train, val")
    chosen: list[Scan] = []
    for label in range(len(CLASS_NAMES)):
        scans = [scan for scan in _all_scans() if scan.label == label]
        scans.sort(key=lambda scan: _hash(f"split/{seed}/{scan.index}"))
        held_out = round(VAL_SHARE * len(scans))
        chosen += scans[:held_out] if split == "val" else scans[held_out:]
    return chosen


def render(scan: Scan, *, seed: int, rendering: int) -> bytes:
    """Return one JPEG of a scan, with its own size, shape, placement and contrast.

    The sides are log-uniform in [MIN_SIDE, MAX_SIDE], their ratio at most MAX_ASPECT. The digit
    follows the shape of its canvas half-way (its aspect is the square root of the canvas's), as
    a photographed object is neither stretched to its frame nor always equally framed.
    """
    # random.Random takes a string, and random() is the same in every Python version.
    draw = random.Random(f"render/{seed}/{scan.index}/{rendering}")
    height, width = _draw_size(draw)
    short, fill = min(height, width), draw.uniform(0.85, 1.0)
    digit_h, digit_w = fill * math.sqrt(short * height), fill * math.sqrt(short * width)
    top = draw.uniform(0.0, height - digit_h)
    left = draw.uniform(0.0, width - digit_w)
    paper = np.array([draw.uniform(205.0, 250.0) for _ in range(3)])
    ink = np.array([draw.uniform(10.0, 75.0) for _ in range(3)])

    # The part of the padded scan, in cells, that the canvas shows: one antialiased resize does
    # placement, stretch and upscaling together.
    cell_h, cell_w = digit_h / _SIDE, digit_w / _SIDE
    x, y = _PAPER - left / cell_w, _PAPER - top / cell_h
    box = (x, y, x + width / cell_w, y + height / cell_h)
    cells = np.frombuffer(scan.pixels, np.uint8).reshape(_SIDE, _SIDE).astype(np.float32) / 16.0
    padded = Image.fromarray(np.pad(cells, _PAPER))
    ink_share = np.asarray(padded.resize((width, height), Image.Resampling.BICUBIC, box=box))
    ink_share = np.clip(ink_share, 0.0, 1.0)[:, :, None]
    pixels = np.rint(paper + (ink - paper) * ink_share).astype(np.uint8)

    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "JPEG", quality=JPEG_QUALITY)
    return target.getvalue()


def _draw_size(draw: random.Random) -> tuple[int, int]:
    """Return (height, width) in pixels."""
    low, high = math.log(MIN_SIDE), math.log(MAX_SIDE)
    while True:
        height = round(math.exp(draw.uniform(low, high)))
        width = round(math.exp(draw.uniform(low, high)))
        if max(height, width) <= MAX_ASPECT * min(height, width):
            return height, width


@lru_cache(maxsize=1)
def _all_scans() -> tuple[Scan, ...]:
    from sklearn.datasets import load_digits  # a second to import, and only the demo needs it

    digits = load_digits()
    return tuple(
        Scan(index, int(label), image.astype(np.uint8).tobytes())
        for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True))
    )


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
