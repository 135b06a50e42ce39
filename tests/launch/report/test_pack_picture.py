from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from launch.report.pack_picture import PackedImage, PackPicture, draw_images, draw_pack
from zeta.packed import PackedBatch

SVG = "{http://www.w3.org/2000/svg}"
PATCH = 4


def _image(rng, h, w, keep, caption=""):
    kept = np.zeros(h * w, bool)
    kept[rng.permutation(h * w)[:keep]] = True
    pixels = rng.integers(0, 256, (h * PATCH, w * PATCH, 3)).astype(np.uint8)
    return PackedImage(pixels, kept.reshape(h, w), caption)


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    images = (_image(rng, 3, 5, 9, "a"), _image(rng, 6, 2, 12, "b"), _image(rng, 1, 7, 1, "c"))
    return PackPicture(images, PATCH, token_budget=64, prefix_tokens=1)


def _pictures(svg: bytes) -> list[np.ndarray]:
    data = re.findall(r'href="data:image/png;base64,([^"]+)"', svg.decode())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(item)))) for item in data]


def test_kept_patches_are_opaque_and_unchanged_and_dropped_ones_grey(picture):
    drawn = _pictures(draw_pack(picture))
    for image, pixels in zip(picture.images, drawn, strict=False):
        kept = np.kron(image.kept, np.ones((PATCH, PATCH), bool))
        assert (pixels[kept][:, :3] == image.pixels[kept]).all()
        assert (pixels[kept][:, 3] == 255).all()
        dropped = pixels[~kept]
        assert (dropped[:, 3] < 128).all()
        assert (dropped[:, :3] == dropped[:, :1]).all(), "a dropped patch has colour"


def test_the_sequence_shows_the_kept_patches_end_to_end(picture):
    strips = _pictures(draw_pack(picture))[len(picture.images) :]
    tokens = np.concatenate(
        [
            strip.reshape(PATCH, -1, PATCH + 1, 4).transpose(1, 0, 2, 3)[:, :, :PATCH]
            for strip in strips
        ]
    )
    assert len(tokens) == picture.token_budget
    position = 0
    for image in picture.images:
        position += picture.prefix_tokens
        for y, x in np.argwhere(image.kept):
            patch = image.pixels[y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
            assert (tokens[position][..., :3] == patch).all()
            position += 1
    assert (tokens[position:] == 0).all()


def test_numbers_in_the_picture_are_those_of_the_pack(picture):
    text = " ".join(
        item.text for item in ElementTree.fromstring(draw_pack(picture)).iter(f"{SVG}text")
    )
    assert picture.tokens == 9 + 12 + 1 + 3
    assert "3 images, 35% of patches dropped" in text
    assert "25 of 64 tokens, 39.1% full" in text
    assert "tail padding: 39 tokens" in text


def test_a_full_pack_without_drops_explains_neither(picture):
    image = _image(np.random.default_rng(1), 4, 4, 16)
    svg = draw_pack(PackPicture((image,), PATCH, token_budget=16)).decode()
    assert "dropped" not in svg
    assert "tail padding" not in svg
    assert "100.0% full" in svg


def test_an_empty_pack_is_all_padding():
    svg = draw_pack(PackPicture((), PATCH, token_budget=40)).decode()
    assert "tail padding: 40 tokens" in svg


def test_hostile_captions_stay_text(picture):
    words = "</text><script>alert(1)</script>\x00\x1b"
    image = PackedImage(picture.images[0].pixels, picture.images[0].kept, words)
    root = ElementTree.fromstring(draw_pack(PackPicture((image,), PATCH, 64)))
    assert not list(root.iter(f"{SVG}script"))


def test_a_large_pack_makes_a_bounded_file():
    rng = np.random.default_rng(0)
    h = w = 64
    image = PackedImage(
        rng.integers(0, 256, (h * 16, w * 16, 3)).astype(np.uint8), np.ones((h, w), bool)
    )
    svg = draw_pack(PackPicture((image,) * 4, 16, token_budget=4 * h * w))
    assert len(svg) < 8_000_000  # of noise, which no PNG can pack


def test_pixels_that_do_not_fit_the_grid_are_refused(picture):
    image = picture.images[0]
    with pytest.raises(ValueError, match="image 0 of the pack has pixels"):
        PackPicture((PackedImage(image.pixels[:-1], image.kept),), PATCH, 64)
    with pytest.raises(ValueError, match="token_budget is 20"):
        PackPicture(picture.images, PATCH, token_budget=20)


def test_kept_patches_are_read_out_of_a_batch(picture):
    batch = _batch(picture, rows=5)
    pictures = [image.pixels for image in picture.images]
    read = PackPicture.from_batch(batch, pictures, ["a", "b", "c"])
    assert (read.patch_size, read.token_budget, read.prefix_tokens) == (PATCH, 64, 1)
    for ours, theirs in zip(picture.images, read.images, strict=True):
        assert (ours.kept == theirs.kept).all()
        assert ours.caption == theirs.caption
    assert draw_pack(read) == draw_pack(picture)
    with pytest.raises(ValueError, match="holds 3 images, but 2 pictures"):
        PackPicture.from_batch(batch, pictures[:2])


def _batch(picture: PackPicture, rows: int) -> PackedBatch:
    """Pack the images of a picture as the loader would, with unused image rows at the end."""
    budget = picture.token_budget
    coords = torch.full((budget, 2), -1, dtype=torch.int32)
    grids = torch.ones((rows, 2), dtype=torch.int32)
    lengths = []
    position = 0
    for row, image in enumerate(picture.images):
        places = torch.from_numpy(np.argwhere(image.kept)).int()
        start = position + picture.prefix_tokens
        coords[start : start + len(places)] = places
        grids[row] = torch.tensor(image.kept.shape)
        lengths.append(picture.prefix_tokens + len(places))
        position += lengths[-1]
    lengths += [0] * (rows - len(lengths)) + [budget - position]
    return PackedBatch(
        patches=torch.zeros((budget, PATCH * PATCH * 3), dtype=torch.uint8),
        coords=coords,
        grids=grids,
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32),
        weights=torch.tensor([1.0] * len(picture.images) + [0.0] * (rows - len(picture.images))),
        sample_ids=torch.arange(rows),
        labels=torch.zeros(rows, dtype=torch.int64),
        lengths=tuple(lengths),
        prefix_tokens=picture.prefix_tokens,
    )


def test_the_sheet_of_images_holds_each_in_its_colours_and_greys_what_was_dropped():
    rng = np.random.default_rng(0)
    images = tuple(_image(rng, h, w, keep) for h, w, keep in ((3, 5, 15), (6, 2, 0), (1, 7, 7)))
    sheet = np.asarray(draw_images(PackPicture(images, PATCH, token_budget=64)))
    colours = {tuple(pixel) for pixel in sheet.reshape(-1, 3)}
    for image in (images[0], images[2]):
        assert {tuple(pixel) for pixel in image.pixels.reshape(-1, 3)} <= colours
    assert not {tuple(pixel) for pixel in images[1].pixels.reshape(-1, 3)} <= colours


def test_a_pack_without_images_is_an_empty_sheet():
    assert draw_images(PackPicture((), PATCH, token_budget=64)).size[0] >= 1
