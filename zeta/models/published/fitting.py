"""Fit published weights to a model whose options may differ: biases, and positions as factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zeta.models.published.timm_names import named_as_navit
from zeta.models.published.timm_vit import FACTORS, TABLE, is_bias, navit_arguments
from zeta.models.published.timm_weights import TimmWeights, patch_of
from zeta.stored_tensors import StoredTensor, in_memory, zeros

_EPS = 1e-6
"""What the norms of timm's ViTs add to the variance, where nothing else is said."""


def fit_timm(
    weights: TimmWeights, wanted: Mapping[str, list[int]]
) -> tuple[dict[str, StoredTensor], str]:
    """Return the weights as a model of `wanted` shapes has them, and a note of approximations.

    Biases that one side lacks are zeros on the other. If the model has factorized position tables,
    a table of a grid becomes these: the nearest sums of a row and a column, in least squares.

    Args:
        weights: published weights.
        wanted: shape of every parameter and buffer of the model, by name.
    """
    made = named_as_navit(weights.tensors, _grid(weights, wanted))
    fitted, note = fit(made, wanted, _own_position(weights, wanted))
    channels = wanted["mean"][0] if "mean" in wanted else 3
    pixels = {name: torch.tensor(value) for name, value in weights.pixels(channels).items()}
    return fitted | in_memory(pixels), note


def fit(
    tensors: Mapping[str, StoredTensor], wanted: Mapping[str, list[int]], position: str | None
) -> tuple[dict[str, StoredTensor], str]:
    """Return weights under NaViT's names as `fit_timm` does, and a note of approximations.

    Args:
        tensors: the weights.
        wanted: shape of every parameter and buffer of the model, by name.
        position: `model.position` of the weights; None: no file tells it.
    """
    made, note = dict(tensors), ""
    for name, tensor in list(made.items()):
        if is_bias(name) and name not in wanted and not tensor.read().any():
            del made[name]
    for name in wanted:
        if is_bias(name) and name not in made and name.replace(".bias", ".weight") in made:
            made[name] = zeros(tuple(wanted[name]), torch.float32)
    if TABLE in made and FACTORS[0] in wanted:
        table = made.pop(TABLE)
        rows, columns, share = nearest_factors(table.read().float())
        made |= in_memory(dict(zip(FACTORS, (rows, columns), strict=True)))
        note = (
            f"its positions of a grid as the nearest sums of a row and a column, {share:.1%} of "
            f"their variance (model.position={position or 'grid_bicubic'} would keep them)"
        )
    return made, note


@torch.no_grad()
def nearest_factors(table_1HWC: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return the tables [1, H, C] and [1, W, C] with sums nearest to a table of a grid.

    Returns:
        Both tables, and the share of the grid's variance that their sums explain.
    """
    mean = table_1HWC.mean(dim=(1, 2), keepdim=True)
    rows = table_1HWC.mean(dim=2) - mean[:, 0] / 2
    columns = table_1HWC.mean(dim=1) - mean[:, 0] / 2
    rest = table_1HWC - rows[:, :, None] - columns[:, None]
    total = (table_1HWC - mean).square().sum()
    return rows, columns, float(1 - rest.square().sum() / total) if total else 1.0


def needed_options(weights: TimmWeights, wanted: Mapping[str, list[int]]) -> str:
    """Return the `model.*` of the NaViT with the same outputs, or why it cannot be built.

    The heads, which are often unknown, and the classes are left out.

    Args:
        weights: published weights.
        wanted: shape of every parameter and buffer of the run's model, by name.
    """
    try:
        found = _arguments(weights, wanted, heads=1)
    except ValueError as error:
        return str(error)
    left_out = ("heads", "dim_head", "num_classes", "mean", "std")
    options = (f"model.{k}={v}" for k, v in found.items() if k not in left_out and v is not None)
    return " ".join(options).replace(", ", ",")


def told_arguments(weights: TimmWeights, wanted: Mapping[str, list[int]]) -> dict[str, Any]:
    """Return the arguments of the NaViT with the same outputs, but for those that nothing tells.

    Args:
        weights: published weights.
        wanted: shape of every parameter and buffer of the run's model, by name.
    """
    heads = weights.option("num_heads", "num_attention_heads")
    try:
        found = _arguments(weights, wanted, heads or 1)
    except ValueError:  # of another model than NaViT, such as MegaVit with parallel blocks
        return {} if heads is None else {"heads": heads}
    untold = set() if heads else {"heads", "dim_head"}  # a norm of queries has a head's shape
    if "architecture" not in weights.config:
        untold |= {"activation", "norm_eps", "position"}
    return {n: v for n, v in ({"norm_eps": _EPS} | found).items() if n not in untold}


def _own_position(weights: TimmWeights, wanted: Mapping[str, list[int]]) -> str | None:
    try:
        return str(_arguments(weights, wanted, heads=1)["position"])
    except ValueError:
        return None


def _arguments(weights: TimmWeights, wanted: Mapping[str, list[int]], heads: int) -> dict[str, Any]:
    grid, patch = _grid(weights, wanted), patch_of(weights)[1]
    image_size = None if grid is None else (grid[0] * patch, grid[1] * patch)
    return navit_arguments(weights, heads, image_size)


def _grid(weights: TimmWeights, wanted: Mapping[str, list[int]]) -> tuple[int, int] | None:
    """Return the grid of the run's position table, if the weights have a flat table of it."""
    grid = (wanted[TABLE][1], wanted[TABLE][2]) if TABLE in wanted else None
    if grid is None and all(name in wanted for name in FACTORS):
        grid = (wanted[FACTORS[0]][1], wanted[FACTORS[1]][1])
    return grid if _table_fits(weights, grid) else None


def _table_fits(weights: TimmWeights, grid: tuple[int, int] | None) -> bool:
    """Return whether a flat position table has the rows of `grid`, with or without a prefix."""
    table = weights.tensors.get("pos_embed")
    if grid is None or table is None:
        return False
    prefix = sum(t.shape[1] for n, t in weights.tensors.items() if n in ("cls_token", "reg_token"))
    return table.shape[1] - grid[0] * grid[1] in (0, prefix)
