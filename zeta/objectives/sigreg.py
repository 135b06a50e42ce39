"""SIGReg: how far embeddings are from a standard normal distribution, by random projections.

Balestriero and LeCun 2025 (arXiv 2511.08544), "sketched isotropic Gaussian regularisation". A
distribution is a standard normal if it is one in every direction. In each of M random directions
the statistic of Epps and Pulley (1983) compares the empirical characteristic function of the
embeddings with that of the normal. Both are sums over embeddings, so that the statistic of a step
is exact whatever its ranks and packs are: only these sums are exchanged.

Letters: n rows of this rank, D channels, M directions, K points of the characteristic function.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_LAST_POINT = 3.0
_POINTS = 17
"""Points of the characteristic function, from 0 to `_LAST_POINT`: it is symmetric."""
_HELD_VALUES = 2**22
"""Values in memory at a time: 16 MiB in fp32."""


class Sums(NamedTuple):
    """The sums over embeddings that the statistic is a function of."""

    cosines_MK: Tensor
    """Sum of cos(t x) over the embeddings, by direction and point; float64."""
    sines_MK: Tensor
    """Sum of sin(t x)."""
    counts_2: Tensor
    """Number of embeddings, and of the images that they are views of; float64."""

    def over_ranks(self) -> Sums:
        """Return the sums over all ranks. NOTE: a collective."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self
        flat = torch.cat([part.flatten() for part in self])
        dist.all_reduce(flat)
        sizes = [part.numel() for part in self]
        parts = zip(flat.split(sizes), self, strict=True)
        return Sums(*(part.view_as(like) for part, like in parts))


def random_directions(dim: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Return [D, M] random directions of length 1, a function of the seed on any device."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(dim, count, generator=generator)
    return torch.nn.functional.normalize(directions, dim=0).to(device)


def characteristic_sums(rows_nD: Tensor, images: int, directions_DM: Tensor) -> Sums:
    """Return the sums of this rank's rows, float32, which are views of `images` images."""
    points_K, _ = _points(rows_nD.device)
    shape = (directions_DM.shape[1], len(points_K))
    cosines = torch.zeros(shape, dtype=torch.float64, device=rows_nD.device)
    sines = torch.zeros_like(cosines)
    for span in _blocks(len(rows_nD), directions_DM.shape[1]):
        angles_nMK = (rows_nD[span] @ directions_DM)[:, :, None] * points_K
        cosines += angles_nMK.cos().sum(0, dtype=torch.float64)
        sines += angles_nMK.sin().sum(0, dtype=torch.float64)
    return Sums(cosines, sines, cosines.new_tensor([len(rows_nD), images]))


def statistic(sums: Sums) -> tuple[Tensor, Sums]:
    """Return the mean statistic over all directions, and its gradient by the sums.

    It is the number of images times the weighted integral of the squared distance between the two
    characteristic functions. (Views of one image are no independent samples.) Float64.
    """
    points_K, weights_K = _points(sums.cosines_MK.device)
    rows, images = sums.counts_2.clamp(min=1).unbind()
    normal_K = (-points_K.double().square() / 2).exp()
    real_MK = sums.cosines_MK / rows - normal_K
    imaginary_MK = sums.sines_MK / rows
    weights_K = weights_K.double() * images / len(real_MK)
    value = ((real_MK.square() + imaginary_MK.square()) * weights_K).sum()
    slope_K = 2 * weights_K / rows
    return value, Sums(real_MK * slope_K, imaginary_MK * slope_K, sums.counts_2)


def row_gradient(rows_nD: Tensor, directions_DM: Tensor, by_sums: Sums) -> Tensor:
    """Return [n, D]: the gradient of the statistic by this rank's rows, from that by the sums."""
    points_K, _ = _points(rows_nD.device)
    by_cosines, by_sines = by_sums.cosines_MK.float(), by_sums.sines_MK.float()
    gradient_nD = torch.zeros_like(rows_nD)
    for span in _blocks(len(rows_nD), directions_DM.shape[1]):
        angles_nMK = (rows_nD[span] @ directions_DM)[:, :, None] * points_K
        slopes_nMK = by_sines * angles_nMK.cos() - by_cosines * angles_nMK.sin()
        gradient_nD[span] = (slopes_nMK @ points_K) @ directions_DM.T
    return gradient_nD


def _points(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the points [K], and their weights [K]: trapezoids of both signs under a Gaussian."""
    points_K = torch.linspace(0, _LAST_POINT, _POINTS, device=device)
    weights_K = torch.full_like(points_K, 2 * _LAST_POINT / (_POINTS - 1))
    weights_K[[0, -1]] /= 2
    return points_K, weights_K * (-points_K.square() / 2).exp()


def _blocks(rows: int, directions: int) -> list[slice]:
    step = max(1, _HELD_VALUES // (directions * _POINTS))
    return [slice(start, start + step) for start in range(0, rows, step)]
