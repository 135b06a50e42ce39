"""Photographs of 2,000 pixels for the programs that measure decoding and smaller shards.

No full-size photographs come with any package here. So these are the three photographs that
scikit-learn and matplotlib bring (427 x 640 to 600 x 512 pixels), enlarged to 2,000 pixels on the
longer side, with fresh grain: without it their JPEGs would have half the bits of a real one, and
decoding takes time by the bit. With it they have 2.3 to 2.8 bits a pixel at quality 90, and cameras
write 2 to 4. Others, with the spectrum of photographs, are synthetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import sklearn.datasets
from PIL import Image

from tests.data_pipeline.photographs import photograph

LONGER_SIDE = 2000
_GRAIN = 6  # levels, of every channel alike


def small_photographs() -> list[Path]:
    """Return the photographs that installed packages bring."""
    images = Path(sklearn.datasets.__file__).parent / "images"
    samples = Path(matplotlib.get_data_path()) / "sample_data"
    return [*sorted(images.glob("*.jpg")), samples / "grace_hopper.jpg"]


def full_size_photographs(count: int) -> Iterator[Image.Image]:
    """Yield photographs of 2,000 pixels on the longer side: one in four is synthetic."""
    sources = [Image.open(path).convert("RGB") for path in small_photographs()]
    for number in range(count):
        which = number % (len(sources) + 1)
        if which == len(sources):
            yield photograph(1500, LONGER_SIDE, number)
            continue
        image = sources[which]
        rng = np.random.default_rng(number)
        # Another part of the photograph each time, of at least 90% of its sides.
        part = rng.uniform(0.9, 1)
        left, top = rng.uniform(0, 1 - part, 2)
        box = (
            left * image.width,
            top * image.height,
            (left + part) * image.width,
            (top + part) * image.height,
        )
        factor = LONGER_SIDE / max(image.size)
        size = (round(image.width * factor), round(image.height * factor))
        large = image.resize(size, Image.Resampling.BICUBIC, box=box)
        grain = rng.normal(0, _GRAIN, (size[1], size[0], 1))
        yield Image.fromarray((np.asarray(large) + grain).clip(0, 255).astype(np.uint8))
