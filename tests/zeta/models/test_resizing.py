"""Pixels are resized alike in the loader, in `embed`, and on the device where a teacher runs."""

from __future__ import annotations

import pytest
import torch

from zeta.models.resizing import in_float, resize, resize_images

SIZES = [((64, 48), (56, 42)), ((16, 32), (28, 28)), ((96, 70), (42, 42)), ((32, 32), (32, 28))]


def noise(size, channels=3):
    """Pixels at which a bicubic filter overshoots most."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, channels, *size), generator=generator, dtype=torch.uint8)


def by_the_loader(images, target):
    resized = [resize(image.permute(1, 2, 0).numpy(), target) for image in images]
    return torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in resized])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "target"), SIZES)
def test_a_batch_is_resized_as_the_loader_resizes_each_image(size, target, channels):
    images = noise(size, channels)
    assert torch.equal(resize_images(images, target), by_the_loader(images, target))


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_a_device_that_resizes_floats_only_differs_by_a_rounding_on_few_pixels(size, target):
    images = noise(size)
    found, wanted = in_float(images, target), by_the_loader(images, target)
    assert found.dtype == torch.uint8
    away = (found.int() - wanted.int()).abs()
    assert away.max() <= 2  # one in each of the two passes
    assert (away > 0).float().mean() < 0.02


def test_images_of_the_wanted_size_are_left_alone():
    images = noise((8, 8))
    assert resize_images(images, (8, 8)) is images
