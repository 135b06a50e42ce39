"""Axial 2-D rotary positions: queries and keys turn by the place of their patch (RoPE).

Su et al. 2021, in the convention of DINOv3 (Siméoni et al. 2025): the first half of a head's planes
turns by the y coordinate of the patch, the second by its x, each plane with a frequency of its own,
the frequencies falling from 1 to 1 / base. Prefix tokens (class, register) are not turned. A
token's angles depend on its own (y, x) and its image's grid (h, w), as those of position tables do.

Letters in shape suffixes: T tokens, S segments, F frequencies of one axis (a quarter of a head).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zeta.config_field import check_choice
from zeta.models.arguments import is_finite
from zeta.models.attention import Segments
from zeta.models.dropout import scrambled

COORDINATES = ("separate", "max", "min", "index")
"""Units of the coordinates: the centre of a patch in [-1, 1], by each side of its image on its own,
by the longer side or by the shorter one; or the patch's number, as in EVA-02."""
DINOV3_BASE = 100.0
"""Base of the frequencies in DINOv3."""
_GOLDEN = 0x9E3779B9 - 2**32
_DRAWS = 5
"""Draws of an image: shift and jitter of y and x, and the rescaling of both."""


@dataclass(frozen=True)
class Rotary:
    """The rotary positions of a model.

    Raises:
        ValueError: an option out of range, by name.
    """

    dim_head: int
    """Channels of a head: a multiple of 4."""
    base: float = DINOV3_BASE
    """Ratio of the highest to the lowest frequency (that of the next one after the last)."""
    coordinates: str = "separate"
    """Units of the coordinates: one of `COORDINATES`."""
    grid: tuple[int, int] | None = None
    """For `index`: the grid (h, w) over which the patches of every image are stretched; None: they
    are counted as they are."""
    shift: float | None = None
    """In training, shift each axis of an image by up to this; None: not."""
    jitter: float | None = None
    """In training, stretch each axis by a factor in [1 / jitter, jitter]; None: not."""
    rescale: float | None = None
    """In training, stretch both axes by one factor in [1 / rescale, rescale]; None: not."""

    def __post_init__(self) -> None:
        if self.dim_head % 4:
            raise ValueError(
                f"dim_head is {self.dim_head}: rotary positions turn pairs of channels by y and by "
                "x, so it must be a multiple of 4"
            )
        check_choice("rope_coordinates", self.coordinates, COORDINATES)
        if self.grid is not None and self.coordinates != "index":
            raise ValueError(
                f"rope_grid is {list(self.grid)}, which rope_coordinates={self.coordinates} does "
                "not read: leave it out, or set rope_coordinates=index"
            )
        _check("rope_base", self.base, 1)
        for name, least in (("shift", 0), ("jitter", 1), ("rescale", 1)):
            value = getattr(self, name)
            if value is not None:
                _check(f"rope_{name}", value, least)

    @property
    def draws(self) -> bool:
        """Whether the coordinates are drawn at random in training."""
        return any(value is not None for value in (self.shift, self.jitter, self.rescale))

    def turned(
        self, segments: Segments, coords_T2: Tensor, grids_T2: Tensor, *, training: bool
    ) -> Segments:
        """Return `segments` with the cosines and sines of every token, computed in fp32.

        Args:
            segments: of the tokens; with seeds where the coordinates are drawn at random.
            coords_T2: (y, x) of each token; negative where it is no patch.
            grids_T2: (h, w) in patches of each token's image.
            training: whether to shift, jitter and rescale.
        """
        place_T2 = self._places(coords_T2, grids_T2)
        if training and self.draws:
            place_T2 = self._drawn(place_T2, segments)
        place_T2 = place_T2.masked_fill(coords_T2[:, :1] < 0, 0.0)
        return replace(segments, rotary=self._tables(place_T2))

    def tables(self, coords_T2: Tensor, grids_T2: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [T, D/2] of patches, without draws."""
        return self._tables(self._places(coords_T2, grids_T2))

    def _tables(self, place_T2: Tensor) -> tuple[Tensor, Tensor]:
        count = self.dim_head // 4
        steps_F = torch.arange(count, device=place_T2.device, dtype=torch.float32) / count
        angles_T2F = place_T2[:, :, None] * self.base**-steps_F
        if self.coordinates != "index":
            angles_T2F = 2 * math.pi * angles_T2F
        angles_TD = angles_T2F.flatten(1)
        return angles_TD.cos(), angles_TD.sin()

    def _places(self, coords_T2: Tensor, grids_T2: Tensor) -> Tensor:
        sides_T2 = grids_T2.float()
        if self.coordinates == "index":
            if self.grid is None:
                return coords_T2.float()
            shares_T2, (height, width) = coords_T2.float() / sides_T2, self.grid
            return torch.stack([shares_T2[:, 0] * height, shares_T2[:, 1] * width], dim=1)
        if self.coordinates == "max":
            sides_T2 = sides_T2.amax(dim=1, keepdim=True)
        elif self.coordinates == "min":
            sides_T2 = sides_T2.amin(dim=1, keepdim=True)
        return 2 * ((coords_T2.float() + 0.5) / sides_T2) - 1

    def _drawn(self, place_T2: Tensor, segments: Segments) -> Tensor:
        """Shift, jitter and rescale each image's coordinates, in the order of DINOv3.

        The draws are hashes of the images' seeds, as in `zeta.models.dropout`: they do not depend
        on the other images of the pack.
        """
        assert segments.seeds_S is not None, "seeded() was not called"
        sites = torch.arange(1, _DRAWS + 1, dtype=torch.int32, device=place_T2.device)
        keys_S5 = scrambled(scrambled(segments.seeds_S[:, None] ^ _GOLDEN) + sites * _GOLDEN)
        draws_S5 = (keys_S5 & 0x7FFFFFFF).float() / 2**30 - 1
        shift_T2, jitter_T2, rescale_T1 = draws_S5[segments.index_T].split((2, 2, 1), dim=1)
        if self.shift is not None:
            place_T2 = place_T2 + shift_T2 * self.shift
        if self.jitter is not None:
            place_T2 = place_T2 * (jitter_T2 * math.log(self.jitter)).exp()
        if self.rescale is not None:
            place_T2 = place_T2 * (rescale_T1 * math.log(self.rescale)).exp()
        return place_T2


def rotary(
    position: str,
    dim_head: int,
    *,
    is_rotary: bool,
    grid: Sequence[int] | None = None,
    **options: Any,
) -> Rotary | None:
    """Return the rotary positions of a model with these constructor arguments, or None.

    Args:
        position: the model's `position`, for messages.
        dim_head: channels of a head.
        is_rotary: whether `position` is a rotary one.
        grid: `rope_grid`.
        options: the others, such as `base` for `rope_base`; None: the default.

    Raises:
        ValueError: an option out of range, or given without rotary positions; by name.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if grid is not None:
        given["grid"] = _grid(grid)
    if is_rotary:
        return Rotary(dim_head, **given)
    if given:
        name = next(iter(given))
        raise ValueError(
            f"rope_{name} is {given[name]!r}, but position={position} is not rotary: leave it out, "
            "or set position to rope"
        )
    return None


def _grid(grid: Sequence[int]) -> tuple[int, int]:
    if len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid):
        raise ValueError(f"rope_grid is {grid!r}: give (height, width) in patches")
    return grid[0], grid[1]


def _check(name: str, value: float, least: float) -> None:
    if not is_finite(value) or value < least or (value == least == 1 and name == "rope_base"):
        raise ValueError(f"{name} is {value!r}: give a finite number of at least {least}")
