"""The limits of a decode: of memory by what the decoder needs, and of time."""

from __future__ import annotations

from PIL import Image, ImageFile

MAX_DECODE_BYTES = 2**30
"""Most memory that a decode may take, from the encoded bytes to RGB."""
MAX_PIXELS = MAX_DECODE_BYTES // 12
"""Most pixels of an image, with the 12 bytes a pixel that most decoders need at most; Pillow warns
of a decompression bomb from here on."""
MAX_SIDE = 2**16 - 1
"""Longest side that fits into the index."""

_BYTES_A_PIXEL = {"WEBP": 20, "AVIF": 20, "JPEG2000": 32}
"""Memory of decoders that need more than 12 bytes a pixel, by Pillow's name of the format. Measured
on images of 16 million pixels: WebP 16 to 18 (two canvases, whatever the image holds), AVIF 10 to
12 for 8 bits, JPEG 2000 20; JPEG 3 to 12, others 5 to 8."""
_MAX_INTERPRETED = 2**21
"""Most samples, and most encoded bytes, of what Pillow decodes in Python: about 2 seconds."""
_MAX_COMMENTS = 1000  # each copies a block of up to 1 MiB in Pillow's reader of plain PPM
_MAX_SCANNED_PIXELS = 2**32  # of all scans of a JPEG together: about 4 seconds
_LEAST_BYTES_OF_SCAN = 10
_TILE_WIDTH, _TILE_LENGTH, _BITS_PER_SAMPLE = 322, 323, 258  # TIFF tags


class ImageError(ValueError):
    """The error for an unusable image; the message is the reason, without the image's name."""


def check_size(height: int, width: int, kind: str = "") -> None:
    """Raise `ImageError` unless an image of this size can be decoded within the limits.

    Args:
        height, width: pixels.
        kind: Pillow's name of the format, if its decoder is known.
    """
    if height < 1 or width < 1:
        raise ImageError(f"header says {width} x {height} pixels")
    most = MAX_DECODE_BYTES // max(12, _BYTES_A_PIXEL.get(kind, 0))
    if max(height, width) > MAX_SIDE or height * width > most:
        of_kind = f" of {kind}" if most < MAX_PIXELS else ""
        raise ImageError(
            f"header says {width} x {height} pixels; "
            f"at most {most}{of_kind} in all and {MAX_SIDE} a side are decoded"
        )


def check_decoder(image: Image.Image, nbytes: int, data: bytes) -> None:
    """Raise `ImageError` if Pillow would take too much memory or time to decode an opened image.

    Args:
        image: the image, not decoded yet.
        nbytes: its size on storage.
        data: its encoded bytes, at least the first 2 MiB.
    """
    check_size(image.height, image.width, image.format or "")
    tags = getattr(image, "tag_v2", {})
    tile = (_number(tags.get(_TILE_LENGTH)), _number(tags.get(_TILE_WIDTH)))
    samples = tags.get(_BITS_PER_SAMPLE) or (8,)
    bits = sum(map(_number, samples if isinstance(samples, tuple) else (samples,)))
    # A strip or tile is decoded as a whole, beside the 7 bytes a pixel of the image and of RGB.
    decoded = max(image.height * image.width, tile[0] * tile[1]) * (bits / 8)
    if tags and decoded + 7 * image.height * image.width > MAX_DECODE_BYTES:
        raise ImageError(
            f"header says {image.width} x {image.height} pixels of {bits} bits, in tiles of "
            f"{tile[1]} x {tile[0]}; at most {MAX_DECODE_BYTES} bytes are decoded"
        )
    parts = image.tile if isinstance(image, ImageFile.ImageFile) else []
    codecs = {part.codec_name for part in parts} & set(Image.DECODERS)
    if not codecs:
        return
    count = max(nbytes, image.height * image.width * len(image.getbands()))
    slow = count > _MAX_INTERPRETED
    slow = slow or ("ppm_plain" in codecs and data.count(b"#") > _MAX_COMMENTS)
    if slow:
        raise ImageError(
            f"too slow to decode ({codecs.pop()}, of which at most {_MAX_INTERPRETED} bytes and "
            f"{_MAX_COMMENTS} comments are read): save the image as PNG"
        )


def check_scans(data: bytes, pixels: int) -> None:
    """Raise `ImageError` if a JPEG has so many scans that decoding it takes too long."""
    if pixels * (len(data) // _LEAST_BYTES_OF_SCAN) <= _MAX_SCANNED_PIXELS:
        return
    scans = data.count(b"\xff\xda")
    if pixels * scans > _MAX_SCANNED_PIXELS:
        raise ImageError(f"too slow to decode (a JPEG of {scans} scans): save the image again")


def _number(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
