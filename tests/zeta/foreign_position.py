"""A kind of position that zeta does not have: one table, read by the distance from the centre."""

import torch

from zeta.models.navit import PatchPositionEmbedding
from zeta.models.parameters import Rules
from zeta.models.position import LINE_TABLE, POSITIONS, PositionTables


def tables(grid):
    """One table, with as many rows as the longer side of the grid that it is made for."""
    return {"pos_embed_r": (max(grid),)}


def weights(coords_T2, grids_T2, grid):
    """Hat functions around each token's distance: 0 in the centre, the last row in a corner."""
    offset_T2 = (coords_T2 + 0.5) / grids_T2 - 0.5
    place_T = offset_T2.norm(dim=1) * 2**0.5 * (max(grid) - 1)
    rows_L = torch.arange(max(grid), device=coords_T2.device)
    weights_TL = (1 - (place_T[:, None] - rows_L).abs()).clamp(min=0)
    return weights_TL * (coords_T2[:, :1] >= 0)  # prefix and padding tokens have no position


RADIAL = PositionTables(tables, weights)
RULES: Rules = {**PatchPositionEmbedding.parameter_rules, "pos_embed_r": LINE_TABLE}


def register(monkeypatch):
    """Do what an entry in `POSITIONS` and one in `parameter_rules` do."""
    monkeypatch.setitem(POSITIONS, "radial", RADIAL)
    monkeypatch.setattr(PatchPositionEmbedding, "parameter_rules", RULES)
