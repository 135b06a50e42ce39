"""Check the constructor arguments that the models share, and derive sizes from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

from zeta.config_field import check_whole
from zeta.models.patchify import check_rate, image_sides

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's pixels in [0, 1], by channel."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Their standard deviation."""


def is_finite(value: object) -> bool:
    """Return whether `value` is a finite real number."""
    return isinstance(value, Real) and math.isfinite(value)


def check_layer_scale(layer_scale: float | None) -> None:
    """Raise ValueError unless `layer_scale` is None or a finite number."""
    if layer_scale is not None and not is_finite(layer_scale):
        raise ValueError(
            f"layer_scale is {layer_scale!r}: give a finite number, or None for no layer scale"
        )


def check_sizes(**sizes: int) -> None:
    """Raise ValueError naming the first argument that is not a whole number of at least 1."""
    for name, size in sizes.items():
        check_whole(name, size, 1)


def check_rates(**rates: float) -> None:
    """Raise ValueError naming the first argument that is not a number in [0, 1)."""
    for name, rate in rates.items():
        check_rate(rate, name)


def table_grid(image_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Return the grid (h, w) in patches, given a side or (height, width) in pixels."""
    height, width = image_sides(image_size)
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"image_size is {image_size!r}: give a side, or (height, width), in multiples of "
            f"patch_size={patch_size}"
        )
    return height // patch_size, width // patch_size


def head_width(dim: int, heads: int, dim_head: int | None) -> int:
    """Return the channels of a head: `dim_head`, or dim / heads if that is None."""
    if dim_head is not None:
        check_whole("dim_head", dim_head, 1)
        return dim_head
    if dim % heads:
        raise ValueError(f"dim is {dim}, not a multiple of heads={heads}: set dim_head")
    return dim // heads


def depth_rates(stochastic_depth: float, depth: int) -> list[float]:
    """Return each block's rate: 0 at the first, `stochastic_depth` at the last, linear between."""
    return [stochastic_depth * i / max(1, depth - 1) for i in range(depth)]
