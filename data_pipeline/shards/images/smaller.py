"""Smaller copies of images, for shards that hold what is trained on and no more.

A copy shows what the loader would see in the original: upright, transparency on white, the high
byte of 16-bit channels, CMYK converted by formula. It is a JPEG with full colour resolution
(4:4:4), because halving that of a small image costs more than a lower quality does: at equal bytes
its pixels differ from the original by up to 1.4 times as much (docs/data.md).
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipeline.shards.images.header import image_size
from data_pipeline.shards.images.limits import MAX_SIDE
from data_pipeline.shards.images.pixels import decoded_pixels
from zeta.models.pictures import upright
from zeta.models.resizing import resize

_JPEG_NAMES = ("jpg", "jpeg", "jfif", "jpe", "image", "img")
"""Last parts of suffixes under which a JPEG may lie; the last two say nothing of the format."""

_WITH_PROFILES = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "JPEG2000")


class Shrinking(NamedTuple):
    """The rule for smaller copies: their size and quality, and what cannot be copied."""

    max_side: int
    """Longest side of a copy, in pixels."""
    quality: int = 90
    """Quality of the JPEG, 1 to 100."""
    drop_unreadable: bool = False
    """Leave out samples whose image cannot be read; else they stay as they are."""

    def check(self) -> None:
        """Raise ValueError unless both are in their range."""
        if not 1 <= self.max_side <= MAX_SIDE:
            raise ValueError(
                f"max_side is {self.max_side}; it must be from 1 to {MAX_SIDE} pixels, such as 512"
            )
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}; it must be from 1 to 100, such as 90")

    def most_bytes(self, nbytes: int) -> int:
        """Return about the most bytes of the copy of an image of `nbytes`.

        Photographs of quality 90 take a third of a byte to half a byte a pixel.
        """
        return min(nbytes, self.max_side * self.max_side)


def smaller_copy(data: bytes, rule: Shrinking) -> bytes | None:
    """Return a JPEG of the image whose longest side is `rule.max_side`, upright.

    Return None if the image is not larger than that: then it stays as it is, with its orientation.
    The size is reduced in one step, from all pixels, bicubic and antialiased. Metadata (EXIF, XMP)
    is left out, because it speaks of the original and would turn the copy again. A colour profile
    is kept if it describes the copy's kind of pixels.

    Raises:
        ImageError: the image cannot be decoded in full.
    """
    header = image_size(data)
    longest = max(header.height, header.width)
    if longest <= rule.max_side:
        return None
    height, width = (
        max(1, round(side * rule.max_side / longest)) for side in (header.height, header.width)
    )
    pixels = decoded_pixels(data, header, scale=1)
    target = (width, height) if header.orientation >= 5 else (height, width)
    copy = np.ascontiguousarray(upright(resize(pixels, target), header.orientation))
    grey = bool((copy == copy[:, :, :1]).all())
    image = Image.fromarray(copy[:, :, 0] if grey else copy)
    return _jpeg(image, rule.quality, _profile(data, b"GRAY" if grey else b"RGB "))


def suffix_of_copy(suffix: str) -> str:
    """Return the suffix under which the copy of an image lies: ``left.png`` becomes ``left.jpg``.

    The suffix is that of the shard, in any case; one that is right for a JPEG stays.
    """
    stem, dot, last = suffix.rpartition(".")
    return suffix if last.lower() in _JPEG_NAMES else f"{stem}{dot}jpg"


def _jpeg(image: Image.Image, quality: int, profile: bytes | None) -> bytes:
    stream = io.BytesIO()
    image.save(
        stream,
        "JPEG",
        quality=quality,
        subsampling=0,
        optimize=True,
        **({} if profile is None else {"icc_profile": profile}),
    )
    return stream.getvalue()


def _profile(data: bytes, space: bytes) -> bytes | None:
    """Return the colour profile of an image if it is for pixels of `space` (ICC.1, bytes 16-19)."""
    try:
        with Image.open(io.BytesIO(data), formats=_WITH_PROFILES) as image:
            profile = image.info.get("icc_profile")
    except MemoryError:
        raise
    except Exception:  # the pixels were decoded; a profile that cannot be read is none
        return None
    return profile if isinstance(profile, bytes) and profile[16:20] == space else None
