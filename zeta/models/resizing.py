"""The one resize that pixels go through: the data pipeline's, `NaViT.embed`'s, and a teacher's."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


class Window(NamedTuple):
    """A part of an image in pixels; its edges may lie between pixels."""

    top: float
    left: float
    height: float
    width: float

    def middle(self, target: tuple[int, int]) -> Window:
        """Return the largest centred part with the aspect ratio of `target` (height, width)."""
        height = min(self.height, self.width * target[0] / target[1])
        width = min(self.width, height * target[1] / target[0])
        top = self.top + (self.height - height) / 2
        return Window(top, self.left + (self.width - width) / 2, height, width)


def resize(
    pixels: NDArray[np.uint8], target: tuple[int, int], extent: tuple[float, float] | None = None
) -> NDArray[np.uint8]:
    """Resize [h, w, c] to `target` (height, width): bicubic, antialiased.

    Args:
        pixels: the image.
        target: size of the result.
        extent: rows and columns of the image to use, not always whole numbers; None: all.
    """
    whole = extent is None or extent == pixels.shape[:2]
    if whole and target == pixels.shape[:2]:
        return pixels
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # channels last, before and after
    if extent is None or whole:
        return resize_images(image, target)[0].permute(1, 2, 0).numpy()
    # torch rounds the size down; 1e-4 keeps a whole number from becoming one less.
    factors = (target[0] + 1e-4) / extent[0], (target[1] + 1e-4) / extent[1]
    resized = F.interpolate(image, scale_factor=factors, mode="bicubic", antialias=True)
    return resized[0, :, : target[0], : target[1]].permute(1, 2, 0).numpy()


def resize_images(images_NCHW: Tensor, target: tuple[int, int]) -> Tensor:
    """Resize uint8 images of one size, [N, C, h, w], to `target` as `resize` does, on any device.

    torch resizes uint8 on the CPU only. Elsewhere the same is computed in float32, which rounds a
    few pixels in a hundred differently.
    """
    if images_NCHW.shape[2:] == target:
        return images_NCHW
    if images_NCHW.device.type != "cpu":
        return in_float(images_NCHW, target)
    return F.interpolate(images_NCHW, target, mode="bicubic", antialias=True)


def in_float(images_NCHW: Tensor, target: tuple[int, int]) -> Tensor:
    """Resize uint8 images [N, C, h, w] to `target` in float32, two levels from `resize` at most.

    The kernel for uint8 resizes the rows first, and rounds before the columns: one pass in float
    would overshoot at edges, by up to 20 levels.
    """
    resized = images_NCHW.float()
    for size in ((resized.shape[2], target[1]), target):
        if resized.shape[2:] != size:
            resized = F.interpolate(resized, size, mode="bicubic", antialias=True)
            resized = resized.round().clamp(0, 255)
    return resized.to(torch.uint8)


def cut(
    pixels: NDArray[np.uint8], window: Window, target: tuple[int, int], *, snap: bool = False
) -> NDArray[np.uint8]:
    """Resize a part of [h, w, c] to `target` (height, width): bicubic, antialiased.

    `snap` moves the edges of the part to whole pixels, which takes a third of the time.
    """
    # Rounding may put an edge slightly outside the pixels, which Pillow refuses.
    bottom = min(window.top + window.height, pixels.shape[0])
    right = min(window.left + window.width, pixels.shape[1])
    if snap:
        top = min(round(window.top), pixels.shape[0] - 1)
        left = min(round(window.left), pixels.shape[1] - 1)
        part = pixels[top : max(round(bottom), top + 1), left : max(round(right), left + 1)]
        return resize(np.ascontiguousarray(part), target)
    # Only Pillow takes a box that does not begin at a whole pixel.
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    box = (window.left, window.top, right, bottom)
    resized = np.asarray(image.resize(target[::-1], Image.Resampling.BICUBIC, box=box))
    return resized.reshape(*target, pixels.shape[2])
