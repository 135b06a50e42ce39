"""Factorized position tables: one row per y coordinate plus one per x (NaViT, section 2.1).

The position of a token depends only on its own (y, x) and its image's whole grid (h, w), not on
dropped patches or on other images in the pack. There are three coordinate systems:

    fractional: y/h and x/w, each side stretched over its whole table (the default);
    fractional_aspect: both axes over the longer side, so that the aspect ratio is kept;
    absolute: y and x themselves; images larger than the tables are an error.

Another kind of table has one row for each patch of a grid, as in published ViTs, and is resized to
the grid of each image like an image (antialiased, as in torch and timm):

    grid_bicubic: as in most ViTs;
    grid_bilinear: as in SigLIP 2;
    grid_bicubic_plain: not antialiased, as in transformers' ViT, CLIP, SigLIP and DINOv2.

Rotary positions (`rope`, see `zeta.models.rotary`) have no table, or one of these beside them, as
in `rope+grid_bicubic`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from zeta.config_field import check_choice
from zeta.models.parameters import ParameterRule

COORDINATES = ("fractional", "fractional_aspect", "absolute")
"""Coordinate systems of the factorized tables."""
GRIDS = ("grid_bicubic", "grid_bilinear", "grid_bicubic_plain")
"""Kinds of tables with a row for each patch of a grid."""
_CUBIC = -0.5
"""Free coefficient of the cubic kernel in antialiased resizing (Keys 1981)."""
_PLAIN_CUBIC = -0.75
"""The same where torch does not antialias."""


def table_coordinates(index_T: Tensor, count_T: Tensor, table_length: int) -> Tensor:
    """Return the place of the i-th of n patches in a table of L rows: clamp((i + .5) L/n - .5).

    The sampling is that of `torch.nn.functional.interpolate(mode="linear", align_corners=False)`
    and timm's NaFlexVit. The result is clamped to [0, L - 1].
    """
    position = (index_T.float() + 0.5) * (table_length / count_T.float()) - 0.5
    return position.clamp(0, table_length - 1)


def interpolation_weights(
    coords_T2: Tensor, grids_T2: Tensor, table_lengths: tuple[int, int], system: str
) -> Tensor:
    """Return the [T, Ly + Lx] weights whose product with the stacked tables is the position.

    A row contains the hat functions around the token's place in both tables, at most two nonzero
    weights for each table. Unlike a gather, a product with them has a deterministic backward on
    every device. Rows with negative coordinates (prefix and padding tokens) are zero.

    Args:
        coords_T2: (y, x) of each token; negative where it is no patch.
        grids_T2: (h, w) in patches of each token's image.
        table_lengths: rows (Ly, Lx) of the tables.
        system: one of `COORDINATES`.
    """
    check_choice("position", system, COORDINATES)
    if system == "fractional_aspect":
        grids_T2 = grids_T2.amax(dim=1, keepdim=True).expand(-1, 2)
    halves = []
    for axis, length in enumerate(table_lengths):
        index_T = coords_T2[:, axis]
        if system == "absolute":
            place_T = index_T.float()
        else:
            place_T = table_coordinates(index_T, grids_T2[:, axis], length)
        rows_L = torch.arange(length, device=coords_T2.device)
        weights_TL = (1 - (place_T[:, None] - rows_L).abs()).clamp(min=0)
        halves.append(weights_TL * (index_T >= 0)[:, None])
    return torch.cat(halves, dim=1)


def grid_weights(
    coords_T2: Tensor, grids_T2: Tensor, table_grid: tuple[int, int], kind: str
) -> Tensor:
    """Return the [T, h * w] weights whose product with a grid table [h * w, C] is the position.

    The resizing is that of `torch.nn.functional.interpolate(align_corners=False)`, with
    `antialias=True` unless the kind is grid_bicubic_plain; an image with the table's own grid uses
    it unchanged. Rows with negative coordinates (prefix and padding tokens) are zero.

    Args:
        coords_T2: (y, x) of each token; negative where it is no patch.
        grids_T2: (h, w) in patches of each token's image.
        table_grid: (h, w) of the table.
        kind: one of `GRIDS`.
    """
    resize = _plain_weights if kind == "grid_bicubic_plain" else partial(_resizing_weights, kind)
    rows_TH, columns_TW = (
        resize(coords_T2[:, axis], grids_T2[:, axis], length)
        for axis, length in enumerate(table_grid)
    )
    weights_THW = rows_TH[:, :, None] * columns_TW[:, None, :]
    return weights_THW.flatten(1) * (coords_T2[:, :1] >= 0)


def _plain_weights(index_T: Tensor, count_T: Tensor, length: int) -> Tensor:
    """Return the weights [T, L] of a cubic through four values, those at the ends repeated."""
    centre_T = (index_T.clamp(min=0).float() + 0.5) * (length / count_T.float()) - 0.5
    first_T = centre_T.floor()
    values_L = torch.arange(length, device=index_T.device)
    weights_TL = centre_T.new_zeros(centre_T.shape[0], length)
    for step in range(-1, 3):
        place_T = (first_T + step).clamp(0, length - 1)
        weight_T = _cubic((centre_T - first_T - step).abs(), _PLAIN_CUBIC)
        weights_TL = weights_TL + weight_T[:, None] * (place_T[:, None] == values_L)
    return weights_TL


def _resizing_weights(kind: str, index_T: Tensor, count_T: Tensor, length: int) -> Tensor:
    """Return the weights [T, L] that resize a line of L values to n, for place i of each token."""
    scale_T = length / count_T.float()
    centre_T = scale_T * (index_T.clamp(min=0).float() + 0.5)
    values_L = torch.arange(length, device=index_T.device) + 0.5
    distance_TL = (values_L - centre_T[:, None]).abs() / scale_T.clamp(min=1)[:, None]
    kernel_TL = _cubic(distance_TL) if kind == "grid_bicubic" else (1 - distance_TL).clamp(min=0)
    return kernel_TL / kernel_TL.sum(dim=1, keepdim=True)


def _cubic(x: Tensor, a: float = _CUBIC) -> Tensor:
    """Return the cubic convolution kernel at distances x >= 0; it is zero from 2 on."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def check_absolute(grids: Sequence[tuple[int, int]], table_lengths: tuple[int, int]) -> None:
    """Raise ValueError for the first image whose grid is larger than the absolute tables."""
    for image, (h, w) in enumerate(grids):
        if h > table_lengths[0] or w > table_lengths[1]:
            raise ValueError(
                f"image {image} has {h} x {w} patches, more than the {table_lengths[0]} x "
                f"{table_lengths[1]} of the absolute position tables: raise image_size, "
                "resize the image, or use position='fractional'"
            )


def initial_table(length: int, dim: int, generator: torch.Generator) -> Tensor:
    """Return a smooth random table [L, dim] of unit variance.

    It is a random mixture of cosines of the fractional coordinate with falling amplitude: nearby
    positions start similar and distant ones different, at the scale of the patch embedding. This
    learns fast on small data: after 300 steps on scanned digits a small NaViT classifies 96.2% of
    the held-out digits correctly, but 65.5% with tables of white noise of deviation 0.02 (the usual
    choice) and 94.8% with white noise of deviation 1 (`python -m tests.benchmarks.small_data`,
    means of 3 seeds).
    """
    fraction_L = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    waves = torch.arange(1, max(length, 2), dtype=torch.float64)
    amplitude = 1 / (1 + waves / 2)
    basis_LK = amplitude * torch.cos(torch.pi * fraction_L[:, None] * waves)
    mix_KD = torch.randn(len(waves), dim, generator=generator, dtype=torch.float64)
    table_LD = basis_LK @ mix_KD
    return (table_LD / amplitude.square().sum().div(2).sqrt()).float()


def _initial_grid(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    rows, columns = (initial_table(n, shape[3], generator) for n in shape[1:3])
    return (rows[:, None] + columns)[None] / math.sqrt(2)


LINE_TABLE = ParameterRule(lambda shape, draw: initial_table(shape[1], shape[2], draw)[None])
"""Rule of a position table [1, L, C]."""
GRID_TABLE = ParameterRule(_initial_grid)
"""Rule of a position table [1, h, w, C]."""


@dataclass(frozen=True)
class PositionTables:
    """The position tables of a model, and the weights that compute positions from them."""

    tables: Callable[[tuple[int, int]], dict[str, tuple[int, ...]]]
    """Function of the tables' grid (h, w); returns the rows of each table by parameter name."""
    weights: Callable[[Tensor, Tensor, tuple[int, int]], Tensor]
    """Function of the coordinates and grids [T, 2] of tokens and of the tables' grid; returns the
    weights [T, rows] whose product with the stacked tables is the position."""
    rotary: bool = False
    """Whether queries and keys are rotated as well, see `zeta.models.rotary`."""


def _line_tables(grid: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    return {"pos_embed_y": grid[:1], "pos_embed_x": grid[1:]}


def _grid_table(grid: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    return {"pos_embed": grid}


def _no_tables(grid: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    return {}


def _no_weights(coords_T2: Tensor, grids_T2: Tensor, grid: tuple[int, int]) -> Tensor:
    return coords_T2.new_zeros(len(coords_T2), 0, dtype=torch.float32)


_TABLES: dict[str, PositionTables] = {
    **{
        system: PositionTables(_line_tables, partial(interpolation_weights, system=system))
        for system in COORDINATES
    },
    **{kind: PositionTables(_grid_table, partial(grid_weights, kind=kind)) for kind in GRIDS},
}
ROPE = "rope"
"""Name of rotary positions without a table."""
POSITIONS: dict[str, PositionTables] = {
    **_TABLES,
    ROPE: PositionTables(_no_tables, _no_weights, rotary=True),
    **{f"{ROPE}+{name}": replace(each, rotary=True) for name, each in _TABLES.items()},
}
"""Kinds of positions by name (`model.position`)."""


def table_of(position: str) -> str | None:
    """Return the kind of table of a position, as grid_bicubic of rope+grid_bicubic; None: none."""
    return None if position == ROPE else position.removeprefix(f"{ROPE}+")
