"""The most probable classes of every image, over all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from zeta.distributed import World
from zeta.packed import PackedBatch
from zeta.probes.rows import Columns, rows_in_order


class TopClasses:
    """An objective for `zeta.train.evaluation.evaluate` that keeps what the model says.

    Args:
        top: number of classes to keep of each image; fewer if the model has fewer.
        world: the ranks.
        independent: whether each class is a yes or no of its own (sigmoid); else they exclude one
            another (softmax).
    """

    headline = "images"

    def __init__(self, top: int, world: World, *, independent: bool) -> None:
        self._top, self._world, self._independent = top, world, independent
        self._parts: list[Columns] = []
        self.rows: dict[str, NDArray[Any]] = {}
        """`key` [n], `classes` [n, top] and `probabilities` [n, top], most probable first, in order
        of `sample_id` [n], on every rank."""

    def check(self, batch: PackedBatch) -> None:
        """Accept any pack: no target is needed."""

    def tally(self) -> TopClasses:
        """Return itself."""
        return self

    def add(self, outputs: Tensor, batch: PackedBatch) -> None:
        """Keep the best classes of [I, K] logits, of the images of weight 1."""
        counted = (batch.weights > 0).cpu().numpy()
        logits = outputs.float()
        shares = logits.sigmoid() if self._independent else logits.softmax(dim=-1)
        best = shares.topk(min(self._top, shares.shape[1]), dim=-1)
        keys = [key for key, used in zip(batch.keys, counted.tolist(), strict=False) if used]
        self._parts.append(
            {
                "sample_id": batch.sample_ids.cpu().numpy()[counted],
                "key": np.array(keys, object),
                "classes": best.indices.cpu().numpy()[counted],
                "probabilities": best.values.cpu().numpy()[counted],
            }
        )

    def metrics(self) -> dict[str, float]:
        """Return `images`. NOTE: a collective."""
        self.rows = rows_in_order(self._parts, self._world)
        return {"images": float(len(self.rows["sample_id"]))}
