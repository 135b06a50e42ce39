"""Features of some thousand images in memory, on every rank."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from zeta.distributed import World
from zeta.packed import PackedBatch
from zeta.probes.rows import Columns, rows_in_order


class FeatureRows:
    """An objective for `zeta.train.evaluation.evaluate` that keeps the features of every image.

    `zeta.probes.feature_files` keeps those of any number of images on disk.

    Args:
        world: the ranks.
    """

    headline = "images"

    def __init__(self, world: World) -> None:
        self._world = world
        self._parts: list[Columns] = []
        self.rows: dict[str, NDArray[Any]] = {}
        """`feature` [n, dim] float32, `label` [n] int64 and `key` [n] in order of `sample_id` [n],
        on every rank."""

    def check(self, batch: PackedBatch) -> None:
        """Accept any pack."""

    def tally(self) -> FeatureRows:
        """Return itself."""
        return self

    def add(self, outputs: Tensor, batch: PackedBatch) -> None:
        """Keep the features [I, dim] of the images of weight 1."""
        counted = (batch.weights > 0).cpu().numpy()
        keys = [key for key, used in zip(batch.keys, counted.tolist(), strict=False) if used]
        keys += [""] * (int(counted.sum()) - len(keys))  # packs that do not come from shards
        self._parts.append(
            {
                "sample_id": batch.sample_ids.cpu().numpy()[counted],
                "label": batch.labels.cpu().numpy()[counted],
                "key": np.array(keys, object),
                "feature": outputs.float().cpu().numpy()[counted],
            }
        )

    def metrics(self) -> dict[str, float]:
        """Put the rows of all ranks in order, and return `images`. NOTE: a collective."""
        self.rows = rows_in_order(self._parts, self._world)
        return {"images": float(len(self.rows["label"]))}
