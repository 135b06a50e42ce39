"""A folder of labelled images as people have them: all formats, sizes and modes, some broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = {"o'hare $(touch pwned)": 1.0, "cats & dogs": 3.0, "zebra": 8.0}
"""Folder name -> stripes of its images; a vision model can tell them apart."""


def write_photos(root: Path, images_per_class: int, seed: int) -> int:
    """Write the images under `root` and return how many of them can be trained on."""
    rng = np.random.default_rng(seed)
    for index, (name, frequency) in enumerate(CLASSES.items()):
        folder = root / name
        folder.mkdir(parents=True)
        for number in range(images_per_class):
            save_as_kind(stripes(rng, frequency, vertical=index == 0), folder, number)
    folder = root / "zebra"
    Image.new("RGB", (3, 3)).save(folder / "tiny.png")
    Image.new("RGB", (5000, 7)).save(folder / "strip.jpg")
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.jpg").write_bytes(b"hidden")
    (folder / "empty.png").write_bytes(b"")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff" + b"garbage" * 10)
    whole = (folder / "img 0.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return 3 * images_per_class + 2


def stripes(rng: np.random.Generator, frequency: float, *, vertical: bool) -> Image.Image:
    """Return a noisy picture of stripes, of a random size from 40 to 200 pixels a side."""
    height, width = rng.integers(40, 200, 2)
    y, x = np.mgrid[0:height, 0:width]
    wave = np.sin((x if vertical else y) * frequency / 20 + rng.uniform(0, 6))
    pixels = 127 + 100 * wave[..., None] + rng.normal(0, 20, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def save_as_kind(image: Image.Image, folder: Path, number: int) -> None:
    """Save an image in one of eight ways that people's folders have."""
    path = folder / f"img {number}.jpg"
    kind = number % 8
    if kind == 1:
        image.convert("L").save(path)
    elif kind == 2:
        image.convert("CMYK").save(path)
    elif kind == 3:
        image.convert("RGBA").save(path.with_suffix(".png"))
    elif kind == 4:
        image.convert("P").save(path.with_suffix(".gif"))
    elif kind == 5:
        image.save(path.with_suffix(".webp"))
    elif kind == 6:
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        image.save(path, exif=exif)
    else:
        image.save(path)
