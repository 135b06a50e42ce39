"""Parsers of the headers of JPEG, PNG, WebP and GIF: size and orientation, nothing decoded.

They accept what Pillow accepts, and find the metadata that Pillow finds; which of it counts is
Pillow's to say, in `zeta.models.pictures.orientation`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngStream

from data_pipeline.shards.images.limits import ImageError
from zeta.models.pictures import orientation

ReadAt = Callable[[int, int], bytes]
"""Function (offset, nbytes) -> bytes, fewer than nbytes only at the end of the data."""

_MAX_STEPS = 4096  # segments or blocks read before a header counts as malformed
_MAX_CHUNKS = 2**17  # of a PNG; encoders that flush every 8 KiB make ten thousands
_MAX_METADATA = 2**24
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"


class ImageFormat(IntEnum):
    """The format of an image by the first bytes of the file, whatever its extension."""

    OTHER = 0
    """Any other format that Pillow reads: BMP, TIFF, AVIF, JPEG 2000, PPM."""
    JPEG = 1
    PNG = 2
    WEBP = 3
    GIF = 4


class ImageHeader(NamedTuple):
    """The facts in the header of an image."""

    format: ImageFormat
    height: int
    """Height in pixels, after `orientation` is applied."""
    width: int
    """Width in pixels, after `orientation` is applied."""
    orientation: int = 1
    """EXIF orientation, 1 to 8; from 5 on, stored rows are the columns of the upright image."""


def upright_header(format: ImageFormat, height: int, width: int, turn: int) -> ImageHeader:
    """Return the header of an image that is stored with an orientation."""
    if turn >= 5:
        height, width = width, height
    return ImageHeader(format, height, width, turn)


def jpeg_header(read: ReadAt) -> ImageHeader:
    """Return the header of a JPEG; bytes between its segments are skipped, as decoders do.

    Raises:
        ImageError: no frame before the image data, or one that Pillow does not decode.
    """
    offset, frame = 2, b""
    exif, xmp = list[bytes](), b""
    for _ in range(_MAX_STEPS):
        segment = read(offset, 10)
        if segment[:1] != b"\xff" or segment[1:2] in _JPEG_STRAY:
            offset = _next_marker(read, offset)
            segment = read(offset, 10)
        marker = segment[1]
        if marker in _JPEG_STANDALONE:
            offset += 2
            continue
        if len(segment) < 10:
            raise ImageError(_JPEG_ENDS)
        # A length below 2, its own size, stands for an empty segment.
        length = max(2, segment[2] << 8 | segment[3])
        if marker == 0xE1:
            start = read(offset + 4, min(length - 2, len(_XMP)))
            if start.startswith(_EXIF):
                exif.append(read(offset + 4 + len(_EXIF), length - 2 - len(_EXIF)))
            elif start == _XMP:
                xmp = read(offset + 4 + len(_XMP), length - 2 - len(_XMP))
        elif marker in _JPEG_FRAME:
            frame = segment
        elif marker in (0xD9, 0xDA):
            if not frame:
                raise ImageError("JPEG has image data before its size")
            return _of_frame(frame, exif, xmp)
        elif marker < 0xC0:
            raise ImageError("JPEG has an unknown marker where a segment should begin")
        offset += 2 + length
    raise ImageError("JPEG has too many segments before its image data")


_JPEG_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})
_JPEG_STRAY = (b"", b"\0", b"\xff")
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xfe]")  # 00 follows a stray FF, and FF is a fill byte
_JPEG_ENDS = "JPEG ends before its size is given, or before its image data"


def _next_marker(read: ReadAt, offset: int) -> int:
    """Return the offset of the first marker at or after `offset`."""
    nbytes = 16  # most segments begin right here
    while len(window := read(offset, nbytes)) >= 2:
        found = _JPEG_MARKER.search(window)
        if found:
            return offset + found.start()
        offset += len(window) - 1
        nbytes = 4096
    raise ImageError(_JPEG_ENDS)


def _of_frame(frame: bytes, exif: list[bytes], xmp: bytes) -> ImageHeader:
    if sum(map(len, exif)) > _MAX_METADATA:
        raise ImageError(f"JPEG has more than {_MAX_METADATA} bytes of EXIF")
    bits, layers = frame[4], frame[9]
    if bits != 8:
        raise ImageError(f"JPEG of {bits} bits a channel: save the image with 8")
    if layers not in (1, 3, 4):
        raise ImageError(f"JPEG of {layers} channels: save the image as grey, RGB or CMYK")
    height, width = (int.from_bytes(frame[at : at + 2], "big") for at in (5, 7))
    info: dict[str, object] = {}
    if exif:
        info["exif"] = _EXIF + b"".join(exif)  # one that is too long for a segment goes on
    if xmp:
        info["xmp"] = xmp
    return upright_header(ImageFormat.JPEG, height, width, _orientation(info))


def png_header(read: ReadAt) -> ImageHeader:
    """Return the header of a PNG; its metadata may follow the pixels, which are skipped.

    Raises:
        ImageError: it has no size, or metadata that Pillow does not read.
    """
    start = read(8, 16)
    if len(start) < 16 or start[4:8] != b"IHDR":
        raise ImageError("PNG ends before its size is given")
    width, height = int.from_bytes(start[8:12], "big"), int.from_bytes(start[12:16], "big")
    stream = PngStream(io.BytesIO())
    offset, animated, framed, in_pixels = 33, False, False, False
    for _ in range(_MAX_CHUNKS):
        chunk = read(offset, 8)
        length, kind = int.from_bytes(chunk[:4], "big"), chunk[4:]
        if len(chunk) < 8 or not _PNG_KIND.fullmatch(kind) or kind == b"IEND":
            break
        if kind in (b"IDAT", b"fdAT") and not in_pixels:
            in_pixels, frames = True, stream.im_n_frames
            animated = frames is not None and (frames > 1 or not framed)
        if kind == b"fcTL":
            framed = True
            if in_pixels and animated:
                break  # of the frames after the first, nothing is read
        elif kind in _PNG_METADATA:
            _read_metadata(stream, read, offset + 8, length, kind)
        offset += 12 + length
    else:
        raise ImageError("PNG has too many chunks")
    return upright_header(ImageFormat.PNG, height, width, _orientation(stream.im_info))


_PNG_KIND = re.compile(rb"\w{4}")
_PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"acTL")
_PNG_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")


def _read_metadata(stream: PngStream, read: ReadAt, offset: int, length: int, kind: bytes) -> None:
    """Let Pillow read a chunk, if it can hold an orientation or the number of frames."""
    if kind in (b"tEXt", b"zTXt", b"iTXt"):
        key = read(offset, min(length, 80)).partition(b"\0")[0]
        if key.decode("latin-1") not in _PNG_KEYS:
            return
    if length > _MAX_METADATA:
        raise ImageError(f"PNG has metadata of {length} bytes")
    stream.fp = io.BytesIO(read(offset, length))
    try:
        stream.call(kind, 0, length)
    except MemoryError:
        raise
    except Exception as error:  # as the decoder would
        raise ImageError(f"PNG has damaged metadata ({type(error).__name__})") from error


def webp_header(read: ReadAt, nbytes: int) -> ImageHeader:
    """Return the header of a WebP of `nbytes`; `ImageError` if it has none."""
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
    end = min(nbytes, 8 + int.from_bytes(read(4, 4), "little"))
    info = _webp_metadata(read, end, flags=payload[0])
    return upright_header(ImageFormat.WEBP, height, width, _orientation(info))


def _webp_metadata(read: ReadAt, end: int, flags: int) -> dict[str, object]:
    """Return the first EXIF and XMP chunks of those that the flags announce."""
    wanted = {b"EXIF": "exif"} if flags & 0x08 else {}
    wanted |= {b"XMP ": "xmp"} if flags & 0x04 else {}
    info: dict[str, object] = {}
    offset = 30
    for _ in range(_MAX_STEPS):
        chunk = read(offset, 8)
        if not wanted or len(chunk) < 8 or offset >= end:
            return info
        length = int.from_bytes(chunk[4:], "little")
        if chunk[:4] in wanted:
            if length > _MAX_METADATA:
                raise ImageError(f"WebP has metadata of {length} bytes")
            info[wanted.pop(chunk[:4])] = read(offset + 8, length)
        offset += 8 + length + length % 2
    raise ImageError("WebP has too many chunks")


def gif_header(read: ReadAt) -> ImageHeader:
    """Return the header of a GIF; `ImageError` if it has no image."""
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


def _orientation(info: Mapping[Any, object]) -> int:
    """Return the orientation of an image with this metadata, named as Pillow names it."""
    if not info:
        return 1
    image = Image.Image()
    image.info = {str(name): value for name, value in info.items()}
    return orientation(image)
