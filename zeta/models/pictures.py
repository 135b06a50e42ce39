"""The rules by which a picture becomes pixels: which side is up, and what its values mean.

The data pipeline and `NaViT.embed` share them, so that a model is shown the same picture wherever
a file is read. Where Pillow has a rule (EXIF, raw profiles, XMP, palettes), it is Pillow's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base

FLIPS = {
    1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1),
}  # fmt: skip
"""Steps (1 or -1) through rows and columns, by orientation; 5 to 8 are transposed before."""

_MODES = {
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV",
    "I;16", "I;16L", "I;16B", "I;16N",
}  # fmt: skip
"""Modes of Pillow whose values have a known black and a known white."""
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
_BITS_PER_SAMPLE = 258
_STRIP = 1 << 20  # pixels converted at a time, so that copies of a large image stay small


def orientation(image: Image.Image) -> int:
    """Return the orientation, 1 to 8, that `PIL.ImageOps.exif_transpose` applies to an image.

    It stands in EXIF (in PNGs also in a raw profile), or in XMP if that has none. It is 1 where it
    is absent, not one of these numbers, or unreadable.
    """
    try:
        value = image.getexif().get(Base.Orientation)
    except MemoryError:
        raise
    except Exception:  # Pillow's parsers raise almost anything on malformed bytes
        return 1
    return next((number for number in FLIPS if number == value), 1)


def obstacle(image: Image.Image) -> str | None:
    """Return why the values of an image cannot be shown to a model; None if they can.

    The image need not be decoded: its header tells.
    """
    if image.mode == "I" and image.format == "PPM":  # Pillow spreads its values over 16 bits
        return None
    if image.mode in ("I", "F"):
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        return (
            f"{kind} pixels, and nothing says which value is white: save the image with 8 or 16 "
            "bits a channel"
        )
    if image.mode not in _MODES:
        return f"pixels of mode {image.mode}: save the image as RGB"
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE)
    if image.mode.startswith("I;16") and bits not in (None, 16, (16,)):
        return "12-bit pixels in 16 bits, which are nearly black: save the image with 8 or 16 bits"
    return None


def stored_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of an image as stored, not yet upright: RGB, [height, width, 3].

    Grey and palettes are expanded, transparency is laid on white, 16-bit channels keep their high
    byte, CMYK is converted by formula, and colour profiles are ignored.

    Raises:
        ValueError: the values have no known meaning, see `obstacle`.
        OSError: the image cannot be decoded (Pillow raises other errors on malformed bytes, too).
    """
    image.load()
    reason = obstacle(image)
    if reason is not None:
        raise ValueError(reason)
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = _rgb(strip)
    return pixels


def upright(pixels: NDArray[np.uint8], turn: int) -> NDArray[np.uint8]:
    """Apply an orientation to [height, width, channels]; the result is a view."""
    if turn >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows, columns = FLIPS[turn]
    return pixels[::rows, ::columns]


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Return [h, w, 3], or [h, w, 1] of grey."""
    if image.mode.startswith("I"):
        return _high_bytes(image)
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _high_bytes(image: Image.Image) -> NDArray[np.uint8]:
    """Return the high bytes of 16-bit grey, [h, w, 1]; the value that is transparent is white."""
    values = np.asarray(image.convert("I"))
    levels = (values.clip(0, 65535) >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        levels[values == transparent] = 255
    return levels[:, :, None]
