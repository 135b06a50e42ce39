from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms, ImageOps

from data_pipeline.loading.decode import Box, decode_image, patch_lines
from data_pipeline.shards.images.header import ImageError, image_size
from tests.data_pipeline.photographs import photo_sizes, photograph
from tests.data_pipeline.shard_fixtures import encode, exif, jpeg, mutated, photo

pytestmark = pytest.mark.filterwarnings("ignore")  # of Pillow, about the damaged files

WHITE, RED = (255, 255, 255), (255, 0, 0)


def decode_whole(data: bytes) -> np.ndarray:
    header = image_size(data)
    return decode_image(data, height=header.height, width=header.width)


def solid(mode: str, colour: object, **options: object) -> bytes:
    return encode(Image.new(mode, (8, 6), colour), "PNG", **options)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_pillow_applies_it(format, orientation):
    data = encode(photo(24, 40), format, exif=exif(orientation))
    with Image.open(io.BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(decode_whole(data), upright)


def test_a_turned_image_is_resized_to_the_upright_target():
    upright = photo(60, 30)
    data = encode(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif(6))
    resized = np.asarray(upright.resize((20, 44), Image.Resampling.BICUBIC)).astype(int)
    assert abs(decode_image(data, height=44, width=20).astype(int) - resized).max() <= 1


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (solid("L", 77), (77, 77, 77)),
        (solid("1", 1), WHITE),
        (solid("LA", (0, 0)), WHITE),
        (solid("LA", (9, 255)), (9, 9, 9)),
        (solid("RGBA", (0, 0, 0, 0)), WHITE),
        (solid("RGBA", (255, 0, 0, 255)), RED),
        (solid("RGBA", (0, 0, 0, 127)), (128, 128, 128)),
        (solid("RGB", RED, transparency=RED), WHITE),
        (encode(Image.new("RGB", (8, 6), RED).quantize(4), "PNG"), RED),
        (encode(Image.new("RGB", (8, 6), RED).quantize(4), "PNG", transparency=0), WHITE),
        (encode(Image.new("RGBA", (8, 6), (0, 0, 0, 0)), "GIF"), WHITE),
        (encode(Image.new("I;16", (8, 6), 200 * 256 + 17), "PNG"), (200, 200, 200)),
        (encode(Image.new("I;16", (8, 6), 65535), "TIFF"), WHITE),
    ],
)
def test_every_kind_of_pixel_becomes_rgb_on_white(data, colour):
    pixels = decode_whole(data)
    assert pixels.shape == (6, 8, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == colour).all()


def test_cmyk_and_grey_jpegs_become_rgb():
    grey = decode_whole(encode(photo(20, 30).convert("L"), quality=95)).astype(int)
    assert (grey[..., 0] == grey[..., 1]).all()
    cmyk = decode_whole(encode(photo(20, 30).convert("CMYK"), quality=95)).astype(int)
    assert abs(cmyk - np.asarray(photo(20, 30)).astype(int)).mean() < 8


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (10, 10), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert (decode_whole(data) == RED).all()


def test_colour_profiles_are_ignored():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    plain, tagged = photo(16, 16), encode(photo(16, 16), "PNG", icc_profile=profile)
    assert np.array_equal(decode_whole(tagged), np.asarray(plain))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_truncated_file_is_refused_at_every_length(format):
    data = encode(photo(40, 50), format)
    for cut in range(0, len(data) - 20, max(1, len(data) // 60)):
        with pytest.raises(ImageError):
            decode_image(data[:cut], height=40, width=50)


def test_cut_files_have_one_reason_wherever_they_are_cut():
    data, reasons = encode(photo(200, 300), "JPEG"), set()
    for cut in (len(data) // 2, len(data) // 2 + 7, len(data) - 100):
        with pytest.raises(ImageError) as refusal:
            decode_image(data[:cut], height=40, width=50)
        reasons.add(str(refusal.value))
    assert reasons == {"cannot be decoded: image file is truncated (OSError)"}


def test_an_image_of_another_size_than_the_index_says_is_refused():
    data = jpeg(40, 60)
    with pytest.raises(ImageError, match="image is 60 x 40 pixels, the index says 40 x 60"):
        decode_image(data, height=8, width=8, stored_size=(60, 40))
    assert decode_image(data, height=8, width=8, stored_size=(40, 60)).shape == (8, 8, 3)


def test_a_header_bomb_is_refused_before_it_is_decoded():
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(ImageError, match="60000 x 60000"):
        decode_image(bytes(data), height=8, width=8)


def phase_shift(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Return the (y, x) shift between two images, to a fraction of a pixel."""
    grey = [a.astype(float).mean(axis=2) for a in (first, second)]
    window = np.outer(np.hanning(grey[0].shape[0]), np.hanning(grey[0].shape[1]))
    cross = np.multiply(
        *[
            f if i else f.conj()
            for i, f in enumerate(np.fft.fft2((g - g.mean()) * window) for g in grey)
        ]
    )
    peak = np.fft.ifft2(cross / (abs(cross) + 1e-9)).real
    shift = []
    for axis in (0, 1):
        line = peak.max(axis=1 - axis)
        at = int(line.argmax())
        left, middle, right = line[at - 1], line[at], line[(at + 1) % len(line)]
        offset = at + (right - left) / (2 * (2 * middle - left - right) + 1e-12)
        shift.append((offset + len(line) / 2) % len(line) - len(line) / 2)
    return shift[0], shift[1]


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("size", [(512, 640), (513, 645), (719, 511)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_scaled_decode_shows_the_same_picture_in_the_same_place(scale, size, orientation):
    data = encode(photo(*size, seed=scale), quality=90, exif=exif(orientation))
    height, width = (side // scale // 8 * 8 for side in image_size(data)[1:3])
    full = decode_image(data, height=height, width=width)
    scaled = decode_image(data, height=height, width=width, scale=scale)
    assert abs(full.astype(int) - scaled.astype(int)).mean() <= 4
    assert max(map(abs, phase_shift(full, scaled))) < 0.25


def test_scale_decodes_at_exactly_that_fraction():
    data = encode(photo(400, 1023))
    for scale in (2, 4, 8):
        with Image.open(io.BytesIO(data)) as image:
            image.draft(None, (1023 // scale, 400 // scale))
            expected = image.resize(
                (100, 40), Image.Resampling.BICUBIC, box=(0, 0, 1023 / scale, 400 / scale)
            )
            assert image.size == (-(-1023 // scale), -(-400 // scale))
        decoded = decode_image(data, height=40, width=100, scale=scale).astype(int)
        assert abs(decoded - np.asarray(expected)).max() <= 2


def test_scaled_decode_of_photographs_is_close_to_full_decode():
    means, tails = [], []
    for number, (height, width) in enumerate(photo_sizes(40)):
        data = encode(photograph(height, width, seed=number), quality=90)
        for scale in (2, 4):
            size = {"height": height // scale // 16 * 16, "width": width // scale // 16 * 16}
            full = decode_image(data, **size).astype(int)
            scaled = decode_image(data, **size, scale=scale)
            difference = abs(full - scaled)
            means.append(difference.mean())
            tails.append(np.percentile(difference, 95))
            assert max(map(abs, phase_shift(full, scaled))) < 0.25
    print(f"mean {np.mean(means):.2f}, worst mean {max(means):.2f}, p95 {max(tails):.1f} of 255")
    assert max(means) <= 4
    assert np.percentile(means, 95) <= 8


def test_the_fast_path_gives_what_pillow_gives(monkeypatch):
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}):
        data = encode(photograph(300, 451), **options)
        fast = decode_image(data, height=96, width=144).astype(int)
        with Image.open(io.BytesIO(data)) as image:
            slow = np.asarray(image.resize((144, 96), Image.Resampling.BICUBIC)).astype(int)
        assert abs(fast - slow).max() <= 1


def test_what_the_strict_decoder_refuses_pillow_decides():
    data = encode(photo(64, 64))
    at = len(data) // 2
    flawed = data[:at] + b"\xff\xd3" + data[at:]  # a restart marker where none belongs
    with pytest.raises(ValueError, match="orrupt"):
        simplejpeg.decode_jpeg(flawed)
    with Image.open(io.BytesIO(flawed)) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(decode_image(flawed, height=64, width=64), expected)


def test_scale_is_ignored_where_it_cannot_help():
    data = encode(photo(40, 60), "PNG")
    assert np.array_equal(
        decode_image(data, height=8, width=8, scale=4), decode_image(data, height=8, width=8)
    )
    assert decode_image(jpeg(3, 5), height=8, width=8, scale=8).shape == (8, 8, 3)


@pytest.mark.parametrize("scale", [1, 2])
def test_crop_takes_the_middle_and_keep_takes_all(scale):
    image = Image.new("RGB", (96, 32), "blue")
    image.paste("red", (32, 0, 64, 32))
    data = encode(image, quality=95, subsampling=0)
    cropped = decode_image(data, height=16, width=16, fit="crop", scale=scale).astype(int)
    assert abs(cropped[:, 1:-1] - RED).max() < 20
    for fit in ("keep", "squash"):
        kept = decode_image(data, height=16, width=48, fit=fit, scale=scale).astype(int)
        assert abs(kept[:, :14] - (0, 0, 255)).max() < 20
        assert abs(kept[:, -14:] - (0, 0, 255)).max() < 20


def test_a_crop_of_a_turned_image_is_upright():
    image = Image.new("RGB", (96, 32), "blue")
    image.paste("red", (32, 0, 64, 32))
    data = encode(image, "PNG", exif=exif(6))
    assert (decode_image(data, height=20, width=20, fit="crop")[1:-1] == RED).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("scale", [1, 2])
def test_a_box_and_a_flip_are_those_of_the_upright_image(orientation, scale):
    upright = photo(240, 320)
    with Image.open(io.BytesIO(encode(upright, quality=95))) as image:
        boxed = image.resize((64, 48), Image.Resampling.BICUBIC, box=(160, 40, 320, 160))
        expected = np.asarray(boxed.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).astype(int)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the inverse of what is applied
    stored = upright.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else upright
    data = encode(stored, quality=95, exif=exif(orientation))
    box = Box(side=0.5, top=1 / 6, left=0.5)
    decoded = decode_image(data, height=48, width=64, box=box, flip=True, scale=scale)
    assert abs(decoded.astype(int) - expected).mean() < 2.5
    assert max(map(abs, phase_shift(decoded, expected))) < 0.25


def test_patches_are_row_major_with_channels_last():
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    patches = patch_lines(image, 2).copy().view(np.uint8).reshape(12, 12)
    assert patches.shape == (12, 12)
    for number, patch in enumerate(patches):
        y, x = divmod(number, 4)
        block = image[2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        assert np.array_equal(patch.reshape(2, 2, 3), block)
    with pytest.raises(ValueError, match="6 x 8 image is not a whole number of 4 patches"):
        patch_lines(image, 4)


def test_2000_mutated_images_decode_or_give_a_reason():
    rng = np.random.default_rng(0)
    formats = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
    seeds = [encode(photo(30, 40), format) for format in formats]
    refused = 0
    for number in range(2000):
        try:
            data = mutated(seeds[number % len(seeds)], rng)
            assert decode_image(data, height=16, width=16).shape == (16, 16, 3)
        except ImageError:
            refused += 1
    assert 0 < refused < 2000
