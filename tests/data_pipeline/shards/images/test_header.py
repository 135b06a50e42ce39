from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.shards.images.header import ImageError, ImageFormat, image_size, read_header
from tests.data_pipeline.shard_fixtures import encode, exif, mutated, photo

pytestmark = pytest.mark.filterwarnings("ignore")  # of Pillow, about the damaged files

VARIANTS = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True, "quality": 30}),
    ("PNG", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {}),
    ("AVIF", {}),
]


def upright_by_pillow(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return ImageOps.exif_transpose(image).size[::-1]


@pytest.mark.parametrize(("format", "options"), VARIANTS)
@pytest.mark.parametrize("orientation", [None, 1, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("size", [(1, 1), (37, 91), (200, 64)])
def test_size_is_what_pillow_finds_after_orientation(format, options, orientation, size):
    block = {} if orientation is None else {"exif": exif(orientation)}
    data = encode(photo(*size), format, **options, **block)
    header = image_size(data)
    assert (header.height, header.width) == upright_by_pillow(data)
    assert header.format.name == (format if format in ImageFormat.__members__ else "OTHER")


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpeg_of_one_or_four_channels(mode):
    header = image_size(encode(photo(30, 50).convert(mode)))
    assert (header.format, header.height, header.width) == (ImageFormat.JPEG, 30, 50)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animations_have_the_size_of_their_canvas(format):
    frames = [photo(33, 44, seed) for seed in range(3)]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    assert image_size(data)[:3] == (ImageFormat[format], 33, 44)


def test_a_gif_whose_frame_is_larger_than_its_screen_has_the_size_that_pillow_decodes():
    data = bytearray(encode(photo(20, 30), "GIF"))
    for screen in ((10, 50), (50, 10)):
        data[6:10] = struct.pack("<HH", *screen)
        with Image.open(io.BytesIO(bytes(data))) as image:
            assert image_size(bytes(data))[1:3] == (image.height, image.width)


def test_bmp_and_ppm_are_other_formats():
    for format in ("BMP", "PPM"):
        header = image_size(encode(photo(12, 34), format))
        assert header == (ImageFormat.OTHER, 12, 34, 1)


def test_an_invalid_orientation_counts_as_none():
    for format in ("JPEG", "PNG", "WEBP"):
        assert image_size(encode(photo(10, 20), format, exif=exif(9)))[1:] == (10, 20, 1)


def test_webp_exif_with_the_prefix_of_jpeg_is_found():
    plain = encode(photo(10, 20), "WEBP", exif=exif(6))
    at = plain.index(b"EXIF")
    assert plain[at + 8 : at + 10] in (b"II", b"MM")  # Pillow writes none
    length = struct.pack("<I", int.from_bytes(plain[at + 4 : at + 8], "little") + 6)
    prefixed = plain[: at + 4] + length + b"Exif\0\0" + plain[at + 8 :]
    assert image_size(plain) == image_size(prefixed) == (ImageFormat.WEBP, 20, 10, 6)


def test_big_endian_exif_after_a_large_segment_is_found():
    tiff = b"MM\0*\0\0\0\x08" + struct.pack(">H HHI HH", 1, 0x0112, 3, 1, 6, 0)
    filler = b"\xff\xe2" + struct.pack(">H", 60_000) + bytes(59_998)
    block = b"Exif\0\0" + tiff
    segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    data = encode(photo(10, 20))
    assert image_size(data[:2] + filler + segment + data[2:])[1:] == (20, 10, 6)


def test_png_exif_after_the_pixels_is_found():
    data = encode(photo(300, 200), "PNG", exif=exif(6))
    at = data.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(data[at : at + 4], "big")
    moved = data[:at] + data[end:-12] + data[at:end] + data[-12:]
    assert moved.index(b"eXIf") > moved.index(b"IDAT")
    assert image_size(moved)[1:3] == upright_by_pillow(moved) == (200, 300)


def test_only_the_head_of_a_large_file_is_read():
    data = encode(photo(1500, 2000), quality=95)
    asked: list[int] = []

    def read_at(offset: int, nbytes: int) -> bytes:
        asked.append(nbytes)
        return data[offset : offset + nbytes]

    assert read_header(read_at, len(data))[1:3] == (1500, 2000)
    assert len(data) > 500_000
    assert sum(asked) <= 4096


def png_of_size(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + checksum + bytes(64)


def jpeg_of_size(width: int, height: int) -> bytes:
    data = bytearray(encode(photo(16, 16)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("make", [png_of_size, jpeg_of_size])
def test_a_header_bomb_is_refused_with_its_size(make):
    with pytest.raises(ImageError, match="60000 x 60000 pixels; at most 89478485"):
        image_size(make(60_000, 60_000))


def test_sides_beyond_the_index_and_empty_sides_are_refused():
    with pytest.raises(ImageError, match="70000 x 10 pixels"):
        image_size(png_of_size(70_000, 10))
    for make in (png_of_size, jpeg_of_size):
        with pytest.raises(ImageError, match="0 x 5"):
            image_size(make(0, 5))
    assert image_size(png_of_size(60_000, 1000))[1:3] == (1000, 60_000)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>not here</html>", "not an image"),
        (b"\xff\xd8\xff", "ends before its size"),
        (b"\xff\xd8\xff\xe0\0\x01" + bytes(9), "ends before its size"),
        (b"\xff\xd8\xff\x02" + bytes(9), "unknown marker"),
        (b"\xff\xd8\xff\xda" + bytes(20), "image data before its size"),
        (b"\xff\xd8\xff" + b"\xff" * 10_000, "ends before its size"),
        (b"\xff\xd8" + b"\xff\xfe\0\2" * 5000 + bytes(9), "too many segments"),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), "PNG ends"),
        (b"RIFF\0\0\0\0WEBPVP8?" + bytes(30), "unknown chunk"),
        (b"RIFF\0\0\0\0WEBPVP8 " + bytes(30), "no start code"),
        (b"GIF89a" + bytes(40), "GIF has no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
    ],
)
def test_what_has_no_size_is_refused_with_a_reason(data, reason):
    with pytest.raises(ImageError, match=reason):
        image_size(data)


@pytest.mark.parametrize(("format", "options"), [*VARIANTS, ("GIF", {}), ("BMP", {})])
def test_a_file_cut_anywhere_gives_its_size_or_a_reason(format, options):
    data = encode(photo(30, 40), format, **options)
    for cut in range(0, min(len(data), 700)):
        try:
            header = image_size(data[:cut])
        except ImageError:
            continue
        assert (header.height, header.width) == (30, 40)


def test_10000_mutated_headers_give_a_size_or_a_reason():
    rng = np.random.default_rng(0)
    seeds = [encode(photo(30, 40), f, **o, exif=exif(6)) for f, o in VARIANTS]
    seeds += [encode(photo(30, 40), "GIF"), encode(photo(30, 40), "BMP")]
    refused = 0
    for number in range(10_000):
        data = seeds[number % len(seeds)]
        # Most of the damage goes to the header, where the parser works.
        head = int(rng.integers(20, 400))
        try:
            header = image_size(mutated(data[:head], rng) + data[head:])
        except ImageError:
            refused += 1
        else:
            assert 0 < header.height * header.width <= 2**28 // 3
    assert 0 < refused < 10_000
