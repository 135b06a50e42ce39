"""Cut a list of images into one packed sequence of patches, with token dropping.

Letters: c channels, p patch side in pixels, h and w sides of the patch grid, T kept patches.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral, Real
from typing import TypeAlias

import torch
from einops import rearrange
from torch import Tensor

DropRate: TypeAlias = float | Callable[[int, int], float]
"""Share of the patches to drop: a constant, or a function of an image's height and width."""
Images: TypeAlias = Tensor | Sequence["Images"]
"""Images [c, height, width] as a list, a list of lists (read in order), or one tensor of them."""

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = (torch.uint8, *FLOAT_DTYPES)
_LEAST_CONTRAST = 0.5
"""Range of values from which on images of floats in [0, 1] count as not normalised."""


@dataclass(frozen=True)
class Patches:
    """The kept patches of several images, end to end, each image's in row-major order."""

    pixels: Tensor
    """[T, p*p*c], channels last inside a patch, of the dtype of the images."""
    coords: Tensor
    """[T, 2] int32 (y, x) in the image's grid."""
    grids: tuple[tuple[int, int], ...]
    """(h, w) of each image in patches, before dropping."""
    lengths: tuple[int, ...]
    """Rows of each image."""

    def with_prefix(self, prefix_tokens: int) -> Patches:
        """Put rows of zeros before each image's patches, for class tokens and registers."""
        if not prefix_tokens:
            return self
        total = len(self.pixels) + prefix_tokens * len(self.lengths)
        numbers = torch.repeat_interleave(torch.tensor(self.lengths))
        rows = torch.arange(len(self.pixels)) + prefix_tokens * (numbers + 1)
        pixels = self.pixels.new_zeros(total, self.pixels.shape[1])
        pixels = pixels.index_copy(0, rows.to(pixels.device), self.pixels)
        coords = self.coords.new_full((total, 2), -1).index_copy(0, rows, self.coords)
        lengths = tuple(length + prefix_tokens for length in self.lengths)
        return Patches(pixels, coords, self.grids, lengths)


def flatten_images(images: Images) -> list[Tensor]:
    """Return the images of a list or nested lists in reading order.

    Raises:
        ValueError: something in the list is not a tensor, or there is no image at all.
    """
    if isinstance(images, Tensor) and images.ndim == 3:
        return [images]
    if isinstance(images, Tensor) and images.ndim == 4:
        return list(images.unbind(0))
    if isinstance(images, Tensor):
        raise ValueError(
            f"an image has shape {tuple(images.shape)}: pass [channels, height, width] tensors"
        )
    if type(images).__module__.partition(".")[0] == "PIL":
        raise ValueError(
            "images holds a PIL image, and a model takes tensors: model.embed([image, ...]) turns "
            "PIL images upright, fits them to whole patches and returns their embeddings (logits: "
            "model.head of these)"
        )
    if not isinstance(images, list | tuple):
        raise ValueError(f"images holds a {type(images).__name__}: pass tensors or lists of them")
    return [image for group in images for image in flatten_images(group)]


def image_sides(image_size: object) -> tuple[int, int]:
    """Return (height, width) in pixels of a side, or of a pair of sides.

    Raises:
        ValueError: not a side or a pair of sides, or a side below 1.
    """
    sides = (image_size, image_size) if isinstance(image_size, Integral) else image_size
    if isinstance(sides, Sequence) and len(sides) == 2:
        height, width = sides
        if isinstance(height, Integral) and isinstance(width, Integral) and min(sides) > 0:
            return int(height), int(width)
    raise ValueError(f"image_size is {image_size!r}: give a side, or (height, width), in pixels")


def patchify(images: list[Tensor], patch_size: int, channels: int) -> Patches:
    """Cut images [c, height, width] into patches; images of one size are cut together.

    Raises:
        ValueError: an image is empty, has another number of channels or a dtype that is not a pixel
            type, or its sides are not multiples of the patch; images differ in dtype; no images.
    """
    if not images:
        raise ValueError("images is empty: pass at least one image")
    by_size: dict[tuple[int, int], list[int]] = {}
    for number, image in enumerate(images):
        _check_image(number, image, images[0], patch_size, channels)
        by_size.setdefault((image.shape[1], image.shape[2]), []).append(number)
    pixels: list[Tensor] = [images[0]] * len(images)
    coords: list[Tensor] = [images[0]] * len(images)
    for (height, width), numbers in by_size.items():
        h, w = height // patch_size, width // patch_size
        stack = torch.stack([images[number] for number in numbers])
        cut = rearrange(stack, "n c (h p) (w q) -> n (h w) (p q c)", p=patch_size, q=patch_size)
        grid = torch.cartesian_prod(
            torch.arange(h, dtype=torch.int32), torch.arange(w, dtype=torch.int32)
        ).view(-1, 2)
        for number, patches in zip(numbers, cut.unbind(0), strict=True):
            pixels[number], coords[number] = patches, grid
    grids = tuple((x.shape[1] // patch_size, x.shape[2] // patch_size) for x in images)
    lengths = tuple(h * w for h, w in grids)
    return Patches(torch.cat(pixels), torch.cat(coords), grids, lengths)


def _check_image(number: int, image: Tensor, first: Tensor, patch_size: int, channels: int) -> None:
    if image.ndim != 3 or image.shape[0] != channels:
        raise ValueError(
            f"image {number} has shape {tuple(image.shape)}: the model takes [channels={channels}, "
            "height, width]"
        )
    height, width = image.shape[1:]
    if height == 0 or width == 0:
        raise ValueError(f"image {number} is {height} x {width} pixels: it holds nothing")
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"image {number} is {height} x {width} pixels, not a multiple of "
            f"patch_size={patch_size}: resize or pad it to "
            f"{math.ceil(height / patch_size) * patch_size} x "
            f"{math.ceil(width / patch_size) * patch_size}"
        )
    if image.dtype not in DTYPES:
        raise ValueError(
            f"image {number} has dtype {image.dtype}: pass uint8 pixels, or normalised floats"
        )
    if image.dtype != first.dtype or image.device != first.device:
        raise ValueError(
            f"image {number} is {image.dtype} on {image.device}, image 0 {first.dtype} on "
            f"{first.device}: pass all images with one dtype on one device"
        )


def check_finite(pixels: Tensor, lengths: Sequence[int]) -> None:
    """Raise ValueError naming the first image with a NaN or infinite pixel (uint8 has none).

    Padding after the last image is checked as well: its gradient is zero, but zero times NaN would
    make every weight NaN. The check reads one value back from the device, and runs only for float
    pixels: packs of the data pipeline are uint8 and are not scanned.

    Args:
        pixels: [T, p*p*c] patches of the images, end to end, then padding.
        lengths: rows of each image.
    """
    if not pixels.is_floating_point() or bool(pixels.isfinite().all()):
        return
    first = int(pixels.isfinite().all(dim=1).logical_not().nonzero()[0])
    image = bisect_right(list(accumulate(lengths)), first)
    where = f"image {image}" if image < len(lengths) else "padding"
    raise ValueError(f"{where} holds NaN or infinite pixels: fix or leave it out")


def check_normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise ValueError if float pixels look like those of [0, 1], which nobody has normalised.

    Taken as normalised they would be a pale grey picture, and the model would answer all the same.
    Pictures that were normalised hold values below 0, unless no pixel is darker than the mean. The
    check reads one value back from the device, and runs only for float pixels.

    Args:
        pixels: [T, p*p*c] patches of the images.
        mean, std: normalisation of the model, of pixels in [0, 1].
    """
    unchanged = all(m == 0 for m in mean) and all(s == 1 for s in std)
    if not pixels.is_floating_point() or unchanged or not pixels.numel():
        return
    low, high = pixels.detach().aminmax()
    if bool((low >= 0) & (high <= 1) & (high - low > _LEAST_CONTRAST)):
        raise ValueError(
            "the images are floats from 0 to 1, which were not normalised: pass uint8 pixels, or "
            "(image - mean) / std with the model's mean and std, as in model.mean[:, None, None]"
        )


def keep_count(patches: int, rate: float) -> int:
    """Return the number of patches that remain if the share `rate` is dropped: at least 1."""
    return max(1, round(patches * (1 - rate)))


def check_rate(rate: object, source: str) -> float:
    """Return `rate` as a float, or raise ValueError naming where it came from."""
    if not isinstance(rate, bool) and isinstance(rate, Real) and 0 <= float(rate) < 1:
        return float(rate)
    raise ValueError(f"{source} is {rate!r}: a dropping rate is a number in [0, 1)")


def drop_tokens(patches: Patches, patch_size: int, dropout: DropRate) -> Patches:
    """Keep a random subset of each image's patches; see `keep_count` for its size.

    Draws from torch's global CPU generator. All images share two sorts, so that 512 tiny images
    cost about as much as one large one.
    """
    kept = []
    for h, w in patches.grids:
        rate = dropout
        if callable(rate):
            height, width = h * patch_size, w * patch_size
            source = f"token_dropout_prob(height={height}, width={width})"
            rate = check_rate(rate(height, width), source)
        kept.append(keep_count(h * w, rate))
    lengths = torch.tensor(patches.lengths)
    image_T = torch.repeat_interleave(lengths)
    starts = lengths.cumsum(0) - lengths
    order = torch.argsort(image_T + torch.rand(len(image_T), dtype=torch.float64))
    rank_T = torch.arange(len(order)) - starts[image_T]  # `order` lists image by image as well
    rows = order[rank_T < torch.tensor(kept)[image_T]].sort().values
    device = patches.pixels.device
    return Patches(
        patches.pixels[rows.to(device)], patches.coords[rows], patches.grids, tuple(kept)
    )
