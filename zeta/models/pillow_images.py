"""Convert PIL images to the input of a model: upright, RGB, with sides of whole patches.

`zeta.models.pictures` and `zeta.models.resizing` do it for the data pipeline too: of one file both
make the same pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from zeta.models.pictures import obstacle, orientation, stored_pixels, upright
from zeta.models.resizing import Window, cut, resize


def check_pillow(image: object, number: int, patch_size: int) -> None:
    """Raise ValueError, with its number, unless `image` is a PIL image of at least one patch."""
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"image {number} is a {type(image).__name__}: pass PIL images, as from Image.open(path)"
        )
    if min(image.size) < patch_size:
        raise ValueError(
            f"image {number} is {image.width} x {image.height} pixels, smaller than a patch of "
            f"{patch_size}: enlarge it, or leave it out"
        )
    reason = obstacle(image)
    if reason is not None:
        raise ValueError(f"image {number} has {reason}")


def pixels_of(image: Image.Image, channels: int) -> Tensor:
    """Return an image as uint8 [channels, height, width], upright; transparency is laid on white.

    Raises:
        ValueError: the model accepts neither grey nor RGB images, or nothing says which value of
            the image is white.
    """
    pixels = _pixels(image, channels)
    return _channels_first(upright(pixels, orientation(image)))


def fitted_pixels(
    image: Image.Image,
    channels: int,
    patch_size: int,
    *,
    side: int,
    fit: str,
    grid: tuple[int, int] | None,
    upscale: float | None = None,
) -> Tensor:
    """Return an image as uint8 [channels, height, width], upright, with sides of whole patches.

    Args:
        image: the image.
        channels: 1 (grey) or 3 (RGB).
        patch_size: pixels of a patch's side.
        side: images of a larger area than side * side are shrunk to it.
        fit: "keep" keeps the aspect ratio; "crop" takes the middle of another aspect ratio, and
            "squash" distorts the image to it.
        grid: rows and columns of patches of every image; None: as many as its own size gives.
        upscale: largest factor by which smaller images are enlarged, as in `trained_grid`; None:
            they are not.

    Raises:
        ValueError: as `pixels_of`.
    """
    pixels = _pixels(image, channels)
    turn = orientation(image)
    height, width, _ = upright(pixels, turn).shape
    square = fit != "keep"
    if grid is not None:
        rows, columns = grid
    elif upscale is None:
        rows, columns = native_grid(height, width, patch_size, side, square=square)
    else:
        rows, columns = trained_grid(height, width, patch_size, side, upscale, square=square)
    target = (rows * patch_size, columns * patch_size)
    # Resized as stored, then turned: so does the pipeline, and the two passes of a resize round.
    stored_target = target[::-1] if turn >= 5 else target
    if fit == "crop":
        window = Window(0, 0, *pixels.shape[:2]).middle(stored_target)
        pixels = cut(pixels, window, stored_target)
    else:
        pixels = resize(pixels, stored_target)
    return _channels_first(upright(pixels, turn))


def native_grid(
    height: int, width: int, patch_size: int, side: int, *, square: bool = False
) -> tuple[int, int]:
    """Return the (rows, columns) of patches of an image at its own size.

    Args:
        height, width: pixels.
        patch_size: pixels of a patch's side.
        side: images of a larger area than side * side are shrunk to it.
        square: whether the image becomes a square, no larger than its shorter side.
    """
    if square:
        patches = max(1, round(min(side, height, width) / patch_size))
        return patches, patches
    scale = min(1.0, side / math.sqrt(height * width))
    return max(1, round(height * scale / patch_size)), max(1, round(width * scale / patch_size))


def trained_grid(
    height: int, width: int, patch_size: int, side: int, upscale: float, *, square: bool
) -> tuple[int, int]:
    """Return the (rows, columns) of patches of an image as held-out images are shown in training.

    It is the grid of `data_pipeline.plan.sampling.token_grids` for one image, which the models,
    below it, cannot import.

    Args:
        height, width: pixels.
        patch_size: pixels of a patch's side.
        side: largest side in training, in pixels: no image has more patches than side * side.
        upscale: largest factor by which smaller images are enlarged towards it.
        square: whether the image becomes a square of that side.
    """
    most = max(1, side**2 // patch_size**2)
    side = max(1, math.isqrt(most * patch_size**2))
    if square:
        rows = columns = max(1, round(side / patch_size))
    else:
        scale = min(side / math.sqrt(height * width), upscale)
        rows = max(1, round(height * scale / patch_size))
        columns = max(1, round(width * scale / patch_size))
    if rows * columns > most:
        factor = math.sqrt(most / (rows * columns))
        smaller = max(1, int(rows * factor)), max(1, int(columns * factor))
        rows = min(smaller[0], most // min(smaller[1], most))
        columns = min(smaller[1], most // rows)
    return rows, columns


def _pixels(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    """Return [height, width, channels] as stored."""
    if channels not in (1, 3):
        raise ValueError(
            f"the model takes {channels} channels, which no PIL image has: use tensors"
        )
    pixels = stored_pixels(image)
    if channels == 3:
        return pixels
    return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]


def _channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
