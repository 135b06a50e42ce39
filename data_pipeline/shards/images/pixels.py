"""Encoded bytes become RGB pixels as they are stored: not yet upright, and not resized.

JPEGs are decoded by libjpeg-turbo straight into an array. Pillow decodes what that strict decoder
refuses, and all other formats. Both release the GIL.
"""

from __future__ import annotations

import io
import re

import numpy as np
import simplejpeg
from PIL import Image

from data_pipeline.shards.images.formats import ImageFormat, ImageHeader
from data_pipeline.shards.images.header import open_other
from data_pipeline.shards.images.limits import ImageError, check_scans, check_size
from zeta.models.pictures import stored_pixels

_PILLOW_NAMES = {
    ImageFormat.JPEG: "JPEG",
    ImageFormat.PNG: "PNG",
    ImageFormat.WEBP: "WEBP",
    ImageFormat.GIF: "GIF",
}


def decoded_pixels(data: bytes, header: ImageHeader, scale: int) -> np.ndarray:
    """Return [h, w, 3] uint8 RGB in the stored orientation, at 1/scale if it is a JPEG.

    Args:
        data: the encoded image.
        header: what `data_pipeline.shards.images.header.image_size` says of it.
        scale: 1, 2, 4 or 8; other formats than JPEG ignore it.

    Raises:
        ImageError: the data cannot be decoded in full, or not at the size of the header.
    """
    if header.format is ImageFormat.JPEG:
        check_scans(data, header.height * header.width)
        decoded = _jpeg_pixels(data, header, scale)
        if decoded is not None:
            return decoded
    try:
        image = _open(data, header, scale)
        pixels = stored_pixels(image)
        if image.format == "TIFF":
            _check_stored_size(image.size, header)
        return pixels
    except (MemoryError, ImageError):
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on malformed bytes
        # Reasons are counted, so the message leaves out the byte count of a truncated file.
        what = re.sub(r" \(\d+ bytes not processed\)", "", str(error))
        raise ImageError(f"cannot be decoded: {what} ({type(error).__name__})") from error


def _jpeg_pixels(data: bytes, header: ImageHeader, scale: int) -> np.ndarray | None:
    """Return the pixels of an intact JPEG; None leaves it to Pillow (CMYK, damage)."""
    sides = (header.height, header.width)
    height, width = (
        -(-side // scale) for side in (sides[::-1] if header.orientation >= 5 else sides)
    )
    try:
        # It would convert CMYK by another formula than Pillow.
        if simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK"):
            return None
        # The decoder takes the smallest of its scales that gives at least the size asked for.
        pixels = simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=scale)
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _open(data: bytes, header: ImageHeader, scale: int) -> Image.Image:
    """Open the image with Pillow, to be decoded at 1/scale if it is a JPEG."""
    if header.format is ImageFormat.OTHER:
        image = open_other(data)
    else:
        image = Image.open(io.BytesIO(data), formats=[_PILLOW_NAMES[header.format]])
    check_size(image.height, image.width)
    if image.format != "TIFF":  # Pillow turns those by itself
        _check_stored_size(image.size, header)
    if scale > 1 and header.format is ImageFormat.JPEG and min(image.size) >= scale:
        # Pillow takes the largest scale that leaves at least the size asked for.
        image.draft(None, (image.width // scale, image.height // scale))
    return image


def _check_stored_size(size: tuple[int, int], header: ImageHeader) -> None:
    """Raise ImageError unless (width, height), as stored, is that of the header."""
    width, height = size[::-1] if header.orientation >= 5 else size
    if (width, height) != (header.width, header.height):
        raise ImageError(f"the decoder finds {size[0]} x {size[1]} pixels")
