"""PIL images of any size and mode to embeddings."""

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.config import ResolutionConfig
from data_pipeline.plan.sampling import token_grids
from tests.zeta.training import tiny_navit
from zeta import MegaVit
from zeta.models.exported import trained_fit
from zeta.models.pillow_images import native_grid, pixels_of, trained_grid


def _photo(width, height, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _model(**changes):
    return tiny_navit(channels=3, **changes)


def test_each_image_is_embedded_as_if_it_were_alone_whatever_the_rest():
    model = _model().train()
    images = [_photo(*size, seed=i) for i, size in enumerate([(8, 8), (61, 17), (4, 40), (33, 90)])]
    alone = torch.cat([model.embed([image]) for image in images])
    for tokens in (1, 40, 4096):
        assert torch.allclose(model.embed(images, tokens=tokens), alone, atol=1e-5)
    assert alone.shape == (4, 16)
    assert not alone.requires_grad
    assert model.training  # as it was


def test_whole_patches_pass_through_untouched_and_others_are_rounded():
    model = _model()
    image = _photo(12, 20)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    with torch.no_grad():
        assert torch.equal(model.embed([image]), model.eval().forward_embeddings([pixels]))
    assert native_grid(21, 13, 4, 1024) == (5, 3)
    assert native_grid(4000, 1000, 4, 100) == (50, 12)  # an area of 100 x 100 at most


def test_modes_orientation_and_transparency_are_as_one_sees_them():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for mode in ("P", "RGBA", "CMYK"):
        assert pixels_of(red.convert(mode), 3)[:, 3, 3].tolist() == pytest.approx(
            [255, 0, 0], abs=2
        )
    assert pixels_of(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), 3).min() == 255
    assert pixels_of(Image.new("L", (4, 6), 77), 3).shape == (3, 6, 4)
    assert pixels_of(Image.new("RGB", (4, 4), (50, 50, 50)), 1).shape == (1, 4, 4)
    deep = Image.fromarray(np.full((4, 4), 0x1234, dtype=np.uint16))
    assert pixels_of(deep, 3).unique().tolist() == [0x12]
    turned = _photo(8, 16)
    exif = turned.getexif()
    exif[0x0112] = 6
    assert pixels_of(turned, 3).shape == (3, 8, 16)


def test_a_model_of_one_size_takes_the_middle_square():
    sizes = {"patch_size": 4, "num_classes": 3, "dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16}
    model = MegaVit(16, **sizes)
    wide = Image.new("RGB", (48, 16), (0, 0, 255))
    wide.paste((255, 0, 0), (16, 0, 32, 16))
    square = Image.new("RGB", (16, 16), (255, 0, 0))
    assert torch.allclose(model.embed([wide]), model.embed([square]), atol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images is empty"),
        (["cat.jpg"], "image 0 is a str: pass PIL images"),
        ([_photo(8, 8), _photo(8, 3)], "image 1 is 8 x 3 pixels, smaller than a patch of 4"),
        ([np.zeros((8, 8, 3))], "image 0 is a ndarray"),
    ],
)
def test_what_is_no_image_or_too_small_is_refused_by_its_number(images, message):
    with pytest.raises(ValueError, match=message):
        _model().embed(images)


def test_channels_that_no_picture_has_are_refused():
    with pytest.raises(ValueError, match="the model takes 5 channels"):
        tiny_navit(channels=5).embed([_photo(8, 8)])


def test_a_model_that_is_called_with_pil_images_names_embed():
    for images in ([_photo(8, 8)], _photo(8, 8), [[_photo(8, 8)]]):
        with pytest.raises(ValueError, match=r"PIL image, .* model\.embed"):
            _model()(images)


def test_32_bit_images_are_refused_by_their_number():
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    for values in (ramp.astype(np.float32), (255 * ramp).astype(np.int32)):
        with pytest.raises(ValueError, match=r"image 1 has .*nothing says which value is white"):
            _model().embed([_photo(8, 8), Image.fromarray(values)])


def test_a_model_trained_on_squares_is_shown_squares():
    wide = Image.new("RGB", (48, 16), (0, 0, 255))
    wide.paste((255, 0, 0), (16, 0, 32, 16))
    model = _model()
    for fit, square in (
        ("crop", Image.new("RGB", (16, 16), (255, 0, 0))),
        ("squash", wide.resize((16, 16), Image.Resampling.BICUBIC)),
    ):
        model.fit = fit
        assert torch.allclose(model.embed([wide]), model.embed([square]), atol=0.05), fit
    model.fit = "crop"
    cropped = model.embed([wide])
    model.fit = "squash"
    assert not torch.allclose(model.embed([wide]), cropped, atol=0.05)


def test_the_fit_of_the_training_is_read_from_an_export():
    for fit in ("keep", "crop", "squash"):
        assert trained_fit({"info": {"resolution": {"fit": fit}}}) == fit
    assert trained_fit({"info": {}}) is None
    assert trained_fit({"info": {"resolution": {"fit": "other"}}}) is None


@pytest.mark.parametrize("fit", ["keep", "crop"])
def test_the_grid_of_one_image_is_that_of_the_pipeline_at_the_sizes_of_training(fit):
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 900, (2, 3000))
    for patch, side, upscale in ((16, 224, 1.0), (8, 100, 1.5), (14, 10, 3.0), (32, 225, 1.0)):
        most = max(1, side**2 // patch**2)
        reached = max(1, int((most * patch * patch) ** 0.5))
        config = ResolutionConfig("fixed", max=reached, fit=fit, max_upscale=upscale)
        sizes = {"patch_size": patch, "max_tokens": most}
        rows, columns, _ = token_grids(config, heights, widths, np.zeros(3000), **sizes)
        for number, (height, width) in enumerate(zip(heights, widths, strict=True)):
            grid = trained_grid(int(height), int(width), patch, side, upscale, square=fit != "keep")
            assert grid == (rows[number], columns[number]), (height, width, patch, side)


def test_an_image_is_shown_as_large_as_in_training_unless_a_side_is_given():
    model, image = _model(), _photo(64, 64)
    at_its_own_size = model.embed([image])
    model.trained_side = 16
    assert torch.equal(model.embed([image]), model.embed([image.copy()], side=16))
    assert torch.equal(model.embed([image], side=1024), at_its_own_size)
    model.max_upscale = 2.0
    small = _photo(8, 8)
    enlarged = model.embed([small])
    assert not torch.allclose(enlarged, model.embed([small], side=16), atol=1e-4)
