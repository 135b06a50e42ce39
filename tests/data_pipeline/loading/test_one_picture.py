"""One file is one picture: for the index, the pipeline's decoder and `NaViT.embed`.

The tolerance at native size is 0 levels: all paths have the same libjpeg-turbo, and Pillow for the
rest. The corpus holds what once differed, or was refused by one of them only.
"""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.loading.decode import decode_image
from data_pipeline.shards.images.header import ImageError, image_size, read_header
from data_pipeline.shards.images.limits import MAX_DECODE_BYTES, check_decoder
from tests.data_pipeline.odd_pictures import odd_pictures, opened
from tests.data_pipeline.shard_fixtures import encode, exif, mutated, photo
from zeta.models.pillow_images import fitted_pixels, pixels_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of Pillow, about the damaged files

PICTURES = odd_pictures()
UNKNOWN_VALUES = ("tiff-float", "tiff-int32", "tiff-lab")


def by_pipeline(data: bytes) -> np.ndarray:
    header = image_size(data)
    return decode_image(data, height=header.height, width=header.width)


def by_embed(data: bytes) -> np.ndarray:
    return pixels_of(opened(data), 3).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", [name for name in PICTURES if name not in UNKNOWN_VALUES])
def test_every_path_makes_the_same_pixels_of_a_file(name):
    assert np.array_equal(by_pipeline(PICTURES[name]), by_embed(PICTURES[name]))


@pytest.mark.parametrize(
    "name", [n for n in PICTURES if n not in UNKNOWN_VALUES and "damaged" not in n]
)
def test_upright_is_what_pillow_makes_upright(name):
    upright = ImageOps.exif_transpose(opened(PICTURES[name]))
    assert by_pipeline(PICTURES[name]).shape[:2] == (upright.height, upright.width)


@pytest.mark.parametrize("name", UNKNOWN_VALUES)
def test_values_without_a_known_white_are_refused_from_the_header_on(name):
    with pytest.raises(ImageError, match="save the image"):
        image_size(PICTURES[name])
    with pytest.raises(ValueError, match="save the image"):
        by_embed(PICTURES[name])


def test_12_bits_in_16_are_refused_as_they_would_be_black():
    tiff = bytearray(PICTURES["tiff-16"])
    at = tiff.index(struct.pack("<HHIH", 258, 3, 1, 16))
    tiff[at + 8] = 12
    with pytest.raises(ImageError, match="12-bit pixels"):
        image_size(bytes(tiff))


def test_mutated_pictures_are_one_picture_or_none():
    rng, both, names = np.random.default_rng(0), 0, list(PICTURES)
    for number in range(1500):
        data = PICTURES[names[number % len(names)]]
        head = int(rng.integers(12, 400))
        changed = mutated(data[:head], rng) + data[head:]
        try:
            found = by_pipeline(changed)
        except ImageError:
            continue
        try:
            shown = by_embed(changed)
        except Exception:  # Pillow, opening the file for the user, refuses it
            continue
        both += 1
        assert np.array_equal(found, shown), (number, names[number % len(names)])
    assert both > 150


@pytest.mark.parametrize("fit", ["keep", "crop", "squash"])
@pytest.mark.parametrize("turn", [1, 6])
def test_resized_pixels_are_the_same_too(fit, turn):
    data = encode(photo(61, 83), exif=exif(turn))
    grid = (4, 4) if fit != "keep" else None
    shown = fitted_pixels(opened(data), 3, 8, side=1024, fit=fit, grid=grid)
    height, width = shown.shape[1:]
    decoded = decode_image(data, height=height, width=width, fit=fit)
    assert np.array_equal(decoded, shown.permute(1, 2, 0).numpy())


def webp_of_size(width: int, height: int) -> bytes:
    """Return 34 bytes that decode to any size."""
    bits = (width - 1) | (height - 1) << 14
    return b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f" + struct.pack("<I", bits) + bytes(9)


def test_a_decode_is_refused_by_the_memory_that_its_decoder_needs():
    with pytest.raises(ImageError, match=r"16383 x 5400 pixels; at most \d+ of WEBP"):
        image_size(webp_of_size(16383, 5400))
    assert image_size(webp_of_size(9000, 5400))[1:3] == (5400, 9000)
    assert MAX_DECODE_BYTES > 9000 * 5400 * 20


def test_a_tile_larger_than_its_image_counts():
    tiff = opened(PICTURES["tiff"])
    check_decoder(tiff, 4000, PICTURES["tiff"])
    tiff.tag_v2[322] = tiff.tag_v2[323] = 60_000
    with pytest.raises(ImageError, match="tiles of 60000 x 60000"):
        check_decoder(tiff, 4000, PICTURES["tiff"])


@pytest.mark.parametrize(
    "data",
    [
        b"P3 1000 1000 255\n" + b"0 " * 3_000_000,
        b"P6 1000 1000 100\n" + bytes(3_000_000),
        b"P3 4 4 255\n" + b"#\n" * 5000 + b"0 " * 48,
    ],
)
def test_what_pillow_decodes_in_python_is_bounded(data):
    with pytest.raises(ImageError, match="too slow to decode"):
        image_size(data)


def test_a_large_file_by_the_raw_decoder_is_read_as_before():
    assert by_pipeline(b"P6 1000 1000 255\n" + bytes(3_000_000)).shape == (1000, 1000, 3)


def test_of_a_ppm_only_the_head_is_indexed():
    data, asked = b"P6 2000 2000 255\n" + bytes(12_000_000), list[int]()

    def read_at(offset: int, nbytes: int) -> bytes:
        asked.append(nbytes)
        return data[offset : offset + nbytes]

    assert read_header(read_at, len(data))[1:3] == (2000, 2000)
    assert sum(asked) < 3_000_000


def test_a_jpeg_of_very_many_scans_is_refused():
    data = encode(Image.new("RGB", (1000, 1000), "red"), progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match=r"a JPEG of \d+ scans"):
        by_pipeline(data[:-2] + scan * 5000 + data[-2:])
    assert by_pipeline(data[:-2] + scan * 3 + data[-2:]).shape == (1000, 1000, 3)
