"""Embed an image as a sequence of a chosen length: patches, layer norm, projection, layer norm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from zeta.config_field import check_whole
from zeta.models.patchify import FLOAT_DTYPES, check_finite, image_sides


class PatchEmbeddings(nn.Module):
    """A module that cuts an image into `seq_len` patches and embeds each of them.

    The grid depends on the image: of all grids of `seq_len` cells that divide its sides, it is the
    one with the squarest patches (224 x 224 pixels and seq_len 16: 4 x 4 patches of 56 x 56).

    The weights depend on the size of the image: they are created at the first forward, or at once
    if `image_size` is given. As with `nn.LazyLinear`, run one forward, or load a state dict, before
    you pass the parameters to an optimizer.

    Args:
        dim_in: channels of the image.
        dim_out: channels of an embedded patch.
        seq_len: patches of an image.
        image_size: pixels of a side, or (height, width).

    Raises:
        ValueError: an argument below 1, or no grid of `seq_len` patches divides the image.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        seq_len: int,
        image_size: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim_in", dim_in), ("dim_out", dim_out), ("seq_len", seq_len)):
            check_whole(name, value, 1)
        self.dim_in, self.dim_out, self.seq_len = dim_in, dim_out, seq_len
        self.image_size: tuple[int, int] | None = None
        if image_size is None:
            self.norm_in: nn.Module = _LazyLayerNorm()
            self.proj: nn.Module = nn.LazyLinear(dim_out)
        else:
            height, width = self.image_size = image_sides(image_size)
            h, w = patch_grid(height, width, seq_len)
            patch_dim = (height // h) * (width // w) * dim_in
            self.norm_in = nn.LayerNorm(patch_dim)
            self.proj = nn.Linear(patch_dim, dim_out)
        self.norm_out = nn.LayerNorm(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """Embed images [B, dim_in, H, W] to [B, seq_len, dim_out].

        Raises:
            ValueError: another shape, an integer dtype, a size other than that of the first image,
                a size that no grid of `seq_len` patches divides, or NaN pixels (with the image's
                number).
        """
        if x.ndim != 4 or x.shape[1] != self.dim_in:
            raise ValueError(f"x has shape {tuple(x.shape)}: pass [batch, {self.dim_in}, H, W]")
        if x.dtype not in FLOAT_DTYPES:
            raise ValueError(f"x has dtype {x.dtype}: pass float pixels, as in x.float() / 255")
        size = (x.shape[2], x.shape[3])
        if self.image_size is not None and size != self.image_size:
            raise ValueError(
                f"x is {size[0]} x {size[1]} pixels, the weights are made for "
                f"{self.image_size[0]} x {self.image_size[1]}: resize it, or make another module"
            )
        h, w = patch_grid(*size, self.seq_len)
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", h=h, w=w)
        check_finite(patches.flatten(0, 1), [self.seq_len] * len(x))
        patches = patches.to(self.norm_out.weight.dtype)
        embedded: Tensor = self.norm_out(self.proj(self.norm_in(patches)))
        self.image_size = size
        return embedded


def patch_grid(height: int, width: int, seq_len: int) -> tuple[int, int]:
    """Return the grid (h, w) with h * w = seq_len that divides the image into squarest patches.

    Raises:
        ValueError: no grid of `seq_len` cells divides height x width pixels.
    """
    grids = [(h, seq_len // h) for h in range(1, seq_len + 1) if seq_len % h == 0]
    fitting = [(h, w) for h, w in grids if height and width and not (height % h or width % w)]
    if not fitting:
        raise ValueError(
            f"seq_len is {seq_len}, but no grid of {seq_len} patches divides an image of "
            f"{height} x {width} pixels: resize it, or choose another seq_len"
        )
    return min(fitting, key=lambda grid: abs(math.log(height * grid[1] / (width * grid[0]))))


class _LazyLayerNorm(LazyModuleMixin, nn.LayerNorm):
    """A layer norm that takes its width from the first input, like `nn.LazyLinear`."""

    cls_to_become = nn.LayerNorm

    def __init__(self) -> None:
        super().__init__(0)
        for name in ("weight", "bias"):
            setattr(self, name, UninitializedParameter())

    def initialize_parameters(self, x: Tensor) -> None:
        """Create weight 1 and bias 0 with the width of `x`, unless a state dict has set them."""
        self.normalized_shape = (x.shape[-1],)
        with torch.no_grad():
            for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
                if isinstance(parameter, UninitializedParameter):
                    parameter.materialize(self.normalized_shape)
                    parameter.fill_(value)
