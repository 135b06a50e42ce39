"""Columns that every rank collects image by image, put together in order of sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zeta.distributed import World

Columns = Mapping[str, NDArray[Any]]
"""Arrays of one length by name; `sample_id` is one of them."""


def rows_in_order(parts: Sequence[Columns], world: World) -> dict[str, NDArray[Any]]:
    """Return the rows of all ranks, in order of `sample_id`. NOTE: a collective.

    The order does not depend on which rank had an image, or in which pack, so that neither shows
    in a sum over the rows.

    Args:
        parts: rows of this rank, in one or more parts with the same columns.
        world: the ranks.
    """
    ranks: list[Columns] = world.gather(_joined(parts))
    rows = _joined(ranks)
    order = np.argsort(rows["sample_id"])
    return {name: column[order] for name, column in rows.items()}


def _joined(parts: Sequence[Columns]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
