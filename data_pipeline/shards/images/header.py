"""The format, size and orientation of an image, read from its header alone.

Pixels are never decoded, and only the few hundred bytes that matter are read of a JPEG, PNG, WebP
or GIF, so that shards are indexed at the speed of their tar headers. The decoder uses the same
functions, so it always agrees with the index.
"""

from __future__ import annotations

import io
import warnings

from PIL import Image

from data_pipeline.shards.images.formats import ImageFormat as ImageFormat
from data_pipeline.shards.images.formats import ImageHeader as ImageHeader
from data_pipeline.shards.images.formats import ReadAt as ReadAt
from data_pipeline.shards.images.formats import (
    gif_header,
    jpeg_header,
    png_header,
    upright_header,
    webp_header,
)
from data_pipeline.shards.images.limits import ImageError as ImageError
from data_pipeline.shards.images.limits import check_decoder, check_size
from zeta.models.pictures import obstacle, orientation

# Pillow warns about every odd tag of a malformed file; the index has the reason already.
warnings.filterwarnings("ignore", module=r"PIL\.")

_HEAD_BYTES = 4096
_WINDOW_BYTES = 1024
_MAX_OTHER_BYTES = 2**28
_MAX_PPM_HEADER = 2**21  # Pillow reads it byte by byte, comments and all
_OTHER_FORMATS = ("BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
_ORIENTATION = 274


def image_size(data: bytes) -> ImageHeader:
    """Return the header of a whole image in memory; see `read_header`."""
    return read_header(lambda offset, nbytes: data[offset : offset + nbytes], len(data))


def read_header(read_at: ReadAt, nbytes: int) -> ImageHeader:
    """Return the format, upright size and orientation of the image behind `read_at`.

    Args:
        read_at: function that reads the encoded image.
        nbytes: bytes of the encoded image.

    Raises:
        ImageError: the header is malformed or truncated, the image is larger than the limits in
            `data_pipeline.shards.images.limits` (a decompression bomb), or nothing says what its
            values mean (32-bit pixels).
    """
    if nbytes == 0:
        raise ImageError("empty file")
    head = read_at(0, _HEAD_BYTES)
    read = _Window(read_at, head).read
    kind = ""
    if head.startswith(b"\xff\xd8\xff"):
        header = jpeg_header(read)
    elif head.startswith(b"\x89PNG\r\n\x1a\n"):
        header = png_header(read)
    elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        header, kind = webp_header(read, nbytes), "WEBP"
    elif head.startswith((b"GIF87a", b"GIF89a")):
        header = gif_header(read)
    else:
        return _other(read_at, nbytes, is_ppm=head.startswith(b"P"))
    check_size(header.height, header.width, kind)
    return header


class _Window:
    """A reader that keeps the bytes it read last, since most reads are small and near."""

    def __init__(self, read_at: ReadAt, head: bytes) -> None:
        self._read_at, self._start, self._bytes = read_at, 0, head

    def read(self, offset: int, count: int) -> bytes:
        at = offset - self._start
        if at < 0 or at + count > len(self._bytes):
            self._start, at = offset, 0
            self._bytes = self._read_at(offset, max(count, _WINDOW_BYTES))
        return self._bytes[at : at + count]


def open_other(data: bytes, nbytes: int | None = None) -> Image.Image:
    """Open an image of format OTHER with Pillow, undecoded.

    Args:
        data: the encoded image, or its first bytes.
        nbytes: bytes of the encoded image; None: `data` is all of it.

    Raises:
        ImageError: the data is not an image of an allowed format, or not one that can be decoded.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_OTHER_FORMATS)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's parsers raise almost anything on malformed bytes
        raise ImageError(f"not an image ({type(error).__name__})") from error
    check_decoder(image, len(data) if nbytes is None else nbytes, data)
    reason = obstacle(image)
    if reason is not None:
        raise ImageError(reason)
    return image


def _other(read_at: ReadAt, nbytes: int, *, is_ppm: bool) -> ImageHeader:
    if nbytes > _MAX_OTHER_BYTES:
        raise ImageError(f"unknown format, and too large to examine: {nbytes} bytes")
    data = read_at(0, min(nbytes, _MAX_PPM_HEADER) if is_ppm else nbytes)
    with open_other(data, nbytes) as image:
        height, width, turn = image.height, image.width, orientation(image)
        if image.format != "TIFF":
            return upright_header(ImageFormat.OTHER, height, width, turn)
        # Pillow turns TIFFs upright by itself, and has done so to their size if a tag says it.
        turned = getattr(image, "tag_v2", {}).get(_ORIENTATION) in (5, 6, 7, 8)
        if (turn >= 5) != turned:
            height, width = width, height
        return ImageHeader(ImageFormat.OTHER, height, width)
