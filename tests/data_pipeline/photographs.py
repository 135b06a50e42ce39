"""Pictures with the sizes and the spectrum of photographs."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = Path(__file__).parents[1] / "benchmarks" / "image_sizes.csv"
"""Width and height of 500 photographs."""


def photo_sizes(count: int) -> list[tuple[int, int]]:
    """Return (height, width) of `count` photographs, evenly taken from the 500."""
    with SIZES.open(encoding="utf-8") as stream:
        sizes = [(int(row["height"]), int(row["width"])) for row in csv.DictReader(stream)]
    return [sizes[number * len(sizes) // count] for number in range(count)]


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return an RGB picture whose contrast falls as 1/f from octave to octave, with grain.

    Natural images do so (Field 1987, "Relations between the statistics of natural images"); as
    JPEG of quality 90 it has about 3 bits a pixel and 100 kB, as photographs of ImageNet have.
    """
    rng = np.random.default_rng(seed)
    total = np.full((height, width, 3), 128, dtype=np.float32)
    for octave in range(1, 10):
        cells = 2**octave
        if cells > max(height, width) / 2:
            break
        coarse = rng.normal(0, 1, (min(cells, height), min(cells, width))).astype(np.float32)
        tint = rng.uniform(0.5, 1, 3).astype(np.float32)
        layer = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(layer)[..., None] * tint * (120 / 2**octave + 5)
    total += rng.normal(0, 9, (height, width, 1)).astype(np.float32)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))
