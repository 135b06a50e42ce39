"""Convert PIL images to the input of a model: upright, RGB, with sides of whole patches.

The pixels equal those of the data pipeline at native resolution, within one level of 255.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from PIL.Image import Image


def check_pillow(image: object, number: int, patch_size: int) -> None:
    """Raise ValueError, with its number, unless `image` is a PIL image of at least one patch."""
    from PIL.Image import Image

    if not isinstance(image, Image):
        raise ValueError(
            f"image {number} is a {type(image).__name__}: pass PIL images, as from Image.open(path)"
        )
    if min(image.size) < patch_size:
        raise ValueError(
            f"image {number} is {image.width} x {image.height} pixels, smaller than a patch of "
            f"{patch_size}: enlarge it, or leave it out"
        )


def pixels_of(image: Image, channels: int) -> Tensor:
    """Return an image as uint8 [channels, height, width], upright; transparency is laid on white.

    Raises:
        ValueError: the model accepts neither grey nor RGB images.
    """
    from PIL import Image as Images
    from PIL import ImageOps

    if channels not in (1, 3):
        raise ValueError(
            f"the model takes {channels} channels, which no PIL image has: use tensors"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit grey keeps its high byte
        raw = bytearray(image.convert("I").tobytes())
        levels = torch.frombuffer(raw, dtype=torch.int32).clamp(0, 65535) >> 8
        image = Images.frombytes("L", image.size, bytes(levels.tolist()))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Images.alpha_composite(Images.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, channels).permute(2, 0, 1)


def native_grid(height: int, width: int, patch_size: int, side: int) -> tuple[int, int]:
    """Return the (rows, columns) of patches of an image at its own size.

    Args:
        height, width: pixels.
        patch_size: pixels of a patch's side.
        side: images of a larger area than side * side are shrunk to it.
    """
    scale = min(1.0, side / math.sqrt(height * width))
    return max(1, round(height * scale / patch_size)), max(1, round(width * scale / patch_size))


def resized(pixels: Tensor, height: int, width: int, *, crop: bool) -> Tensor:
    """Resize uint8 [c, h, w] to [c, height, width], antialiased.

    Args:
        crop: use only the largest centred box of the wanted shape, not the whole image.
    """
    if crop:
        inner_h = min(pixels.shape[1], max(1, round(pixels.shape[2] * height / width)))
        inner_w = min(pixels.shape[2], max(1, round(pixels.shape[1] * width / height)))
        top, left = (pixels.shape[1] - inner_h) // 2, (pixels.shape[2] - inner_w) // 2
        pixels = pixels[:, top : top + inner_h, left : left + inner_w]
    if pixels.shape[1:] == (height, width):
        return pixels
    # Channels last in memory: then the kernel for uint8 rounds like the pipeline's.
    image = pixels[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(image, size=(height, width), mode="bicubic", antialias=True)[0]
