"""The format, size and EXIF orientation of an image, read from its header alone.

Pixels are never decoded, and only the few hundred bytes that matter are read of a JPEG, PNG, WebP
or GIF, so that shards are indexed at the speed of their tar headers. The decoder uses the same
functions, so it always agrees with the index.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from PIL import Image

# Pillow warns about every odd tag of a malformed file; the index has the reason already.
warnings.filterwarnings("ignore", module=r"PIL\.")

ReadAt = Callable[[int, int], bytes]
"""Function (offset, nbytes) -> bytes, fewer than nbytes only at the end of the data."""

MAX_PIXELS = 2**28 // 3
"""Most pixels of an image: 256 MiB as RGB, where Pillow warns of a decompression bomb."""
MAX_SIDE = 2**16 - 1
"""Longest side that fits into the index."""

_HEAD_BYTES = 4096
_MAX_OTHER_BYTES = 2**28
_MAX_STEPS = 4096  # segments, chunks or blocks read before a header counts as malformed
_OTHER_FORMATS = ("BMP", "TIFF", "AVIF", "JPEG2000", "PPM")


class ImageFormat(IntEnum):
    """The format of an image by the first bytes of the file, whatever its extension."""

    OTHER = 0
    """Any other format that Pillow reads: BMP, TIFF, AVIF, JPEG 2000, PPM."""
    JPEG = 1
    PNG = 2
    WEBP = 3
    GIF = 4


class ImageError(ValueError):
    """The error for an unusable image; the message is the reason, without the image's name."""


class ImageHeader(NamedTuple):
    """The facts in the header of an image."""

    format: ImageFormat
    height: int
    """Height in pixels, after `orientation` is applied."""
    width: int
    """Width in pixels, after `orientation` is applied."""
    orientation: int = 1
    """EXIF orientation, 1 to 8; from 5 on, stored rows are the columns of the upright image."""


def image_size(data: bytes) -> ImageHeader:
    """Return the header of a whole image in memory; see `read_header`."""
    return read_header(lambda offset, nbytes: data[offset : offset + nbytes], len(data))


def read_header(read_at: ReadAt, nbytes: int) -> ImageHeader:
    """Return the format, upright size and orientation of the image behind `read_at`.

    Args:
        read_at: function that reads the encoded image.
        nbytes: bytes of the encoded image.

    Raises:
        ImageError: the header is malformed or truncated, or the image is larger than `MAX_PIXELS`
            or `MAX_SIDE` (a decompression bomb).
    """
    if nbytes == 0:
        raise ImageError("empty file")
    head = read_at(0, _HEAD_BYTES)

    def read(offset: int, count: int) -> bytes:
        if offset + count <= len(head):
            return head[offset : offset + count]
        return read_at(offset, count)

    if head.startswith(b"\xff\xd8\xff"):
        header = _jpeg(read)
    elif head.startswith(b"\x89PNG\r\n\x1a\n"):
        header = _png(read)
    elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        header = _webp(read, nbytes)
    elif head.startswith((b"GIF87a", b"GIF89a")):
        header = _gif(read)
    else:
        header = _other(read_at, nbytes)
    check_size(header.height, header.width)
    return header


def check_size(height: int, width: int) -> None:
    """Raise `ImageError` unless the size is positive and within the limits of this module."""
    if height < 1 or width < 1:
        raise ImageError(f"header says {width} x {height} pixels")
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise ImageError(
            f"header says {width} x {height} pixels; "
            f"at most {MAX_PIXELS} in all and {MAX_SIDE} a side are decoded"
        )


def open_other(data: bytes) -> tuple[Image.Image, int]:
    """Open an image of format OTHER with Pillow, undecoded; return it and its orientation.

    Raises:
        ImageError: the data is not an image of an allowed format.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_OTHER_FORMATS)
        # Pillow turns TIFFs upright by itself.
        orientation = 1 if image.format == "TIFF" else image.getexif().get(0x0112, 1)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's parsers raise almost anything on malformed bytes
        raise ImageError(f"not an image ({type(error).__name__})") from error
    valid = isinstance(orientation, int) and 1 <= orientation <= 8
    return image, orientation if valid else 1


def _other(read_at: ReadAt, nbytes: int) -> ImageHeader:
    if nbytes > _MAX_OTHER_BYTES:
        raise ImageError(f"unknown format, and too large to examine: {nbytes} bytes")
    image, orientation = open_other(read_at(0, nbytes))
    with image:
        return _upright(ImageFormat.OTHER, image.height, image.width, orientation)


def _upright(format: ImageFormat, height: int, width: int, orientation: int) -> ImageHeader:
    if orientation >= 5:
        height, width = width, height
    return ImageHeader(format, height, width, orientation)


def _jpeg(read: ReadAt) -> ImageHeader:
    offset, orientation = 2, 0
    for _ in range(_MAX_STEPS):
        segment = read(offset, 9)
        if len(segment) < 9:
            raise ImageError("JPEG ends before its size is given")
        if segment[0] != 0xFF:
            raise ImageError("JPEG has no marker where a segment should begin")
        marker = segment[1]
        if marker == 0xFF:  # fill byte
            offset += 1
        elif marker in _JPEG_STANDALONE:
            offset += 2
        elif marker in _JPEG_FRAME:
            height, width = (
                int.from_bytes(segment[5:7], "big"),
                int.from_bytes(segment[7:9], "big"),
            )
            return _upright(ImageFormat.JPEG, height, width, orientation or 1)
        elif marker in (0xD9, 0xDA):
            raise ImageError("JPEG has image data before its size")
        else:
            length = int.from_bytes(segment[2:4], "big")
            if length < 2:
                raise ImageError("JPEG segment of negative length")
            if marker == 0xE1 and not orientation and segment[4:8] == b"Exif":
                orientation = _exif_orientation(read(offset + 4, length - 2)[6:])
            offset += 2 + length
    raise ImageError("JPEG has too many segments before its size")


_JPEG_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})


def _png(read: ReadAt) -> ImageHeader:
    start = read(8, 16)
    if len(start) < 16 or start[4:8] != b"IHDR":
        raise ImageError("PNG ends before its size is given")
    width, height = int.from_bytes(start[8:12], "big"), int.from_bytes(start[12:16], "big")
    offset, orientation = 33, 1
    for _ in range(_MAX_STEPS):
        chunk = read(offset, 8)
        if len(chunk) < 8 or chunk[4:8] == b"IEND":
            break
        length = int.from_bytes(chunk[:4], "big")
        if chunk[4:8] == b"eXIf":
            orientation = _exif_orientation(read(offset + 8, min(length, 2**16)))
            break
        offset += 12 + length
    return _upright(ImageFormat.PNG, height, width, orientation)


def _webp(read: ReadAt, nbytes: int) -> ImageHeader:
    start = read(12, 18)
    if len(start) < 18:
        raise ImageError("WebP ends before its size is given")
    kind, payload = start[:4], start[8:]
    if kind == b"VP8 ":
        if payload[3:6] != b"\x9d\x01\x2a":
            raise ImageError("WebP frame has no start code")
        width = int.from_bytes(payload[6:8], "little") & 0x3FFF
        height = int.from_bytes(payload[8:10], "little") & 0x3FFF
        return ImageHeader(ImageFormat.WEBP, height, width)
    if kind == b"VP8L":
        if payload[0] != 0x2F:
            raise ImageError("WebP frame has no start code")
        bits = int.from_bytes(payload[1:5], "little")
        return ImageHeader(ImageFormat.WEBP, ((bits >> 14) & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if kind != b"VP8X":
        raise ImageError(f"WebP begins with an unknown chunk {kind!r}")
    width = int.from_bytes(payload[4:7], "little") + 1
    height = int.from_bytes(payload[7:10], "little") + 1
    orientation = _webp_orientation(read, nbytes) if payload[0] & 0x08 else 1
    return _upright(ImageFormat.WEBP, height, width, orientation)


def _webp_orientation(read: ReadAt, nbytes: int) -> int:
    offset = 30
    for _ in range(_MAX_STEPS):
        chunk = read(offset, 8)
        if len(chunk) < 8 or offset >= nbytes:
            break
        length = int.from_bytes(chunk[4:8], "little")
        if chunk[:4] == b"EXIF":
            exif = read(offset + 8, min(length, 2**16))
            return _exif_orientation(exif.removeprefix(b"Exif\0\0"))
        offset += 8 + length + length % 2
    return 1


def _gif(read: ReadAt) -> ImageHeader:
    screen = read(6, 7)
    if len(screen) < 7:
        raise ImageError("GIF ends before its size is given")
    width, height = int.from_bytes(screen[:2], "little"), int.from_bytes(screen[2:4], "little")
    offset = 13 + (3 << ((screen[4] & 7) + 1) if screen[4] & 0x80 else 0)
    for _ in range(_MAX_STEPS):
        block = read(offset, 10)
        if block[:1] == b"\x2c" and len(block) == 10:
            # A first frame larger than the screen enlarges it, as in Pillow.
            left, top, across, down = (
                int.from_bytes(block[i : i + 2], "little") for i in (1, 3, 5, 7)
            )
            return ImageHeader(ImageFormat.GIF, max(height, top + down), max(width, left + across))
        if block[:1] != b"\x21" or len(block) < 3:
            break
        offset = _skip_gif_blocks(read, offset + 2)
    raise ImageError("GIF has no image")


def _skip_gif_blocks(read: ReadAt, offset: int) -> int:
    for _ in range(_MAX_STEPS):
        length = read(offset, 1)
        if not length:
            break
        offset += 1 + length[0]
        if length[0] == 0:
            return offset
    raise ImageError("GIF has no image")


def _exif_orientation(tiff: bytes) -> int:
    """Return the orientation in the first directory of an EXIF block; 1 if absent or invalid."""
    order = {b"II": "little", b"MM": "big"}.get(tiff[:2])
    if order is None:
        return 1
    little = order == "little"

    def number(start: int, count: int) -> int:
        return int.from_bytes(tiff[start : start + count], "little" if little else "big")

    directory = number(4, 4)
    for entry in range(min(number(directory, 2), (len(tiff) - directory - 2) // 12)):
        start = directory + 2 + 12 * entry
        if number(start, 2) == 0x0112:
            value = number(start + 8, 2 if number(start + 2, 2) == 3 else 4)
            return value if 1 <= value <= 8 else 1
    return 1
