"""Scores of every single image, over all ranks, for evaluations by group of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from zeta.distributed import World
from zeta.packed import PackedBatch
from zeta.probes.rows import Columns, rows_in_order

_NO_SCORES = ("sample_id", "label", "key", "predicted", "probability")


@runtime_checkable
class RowObjective(Protocol):
    """A classification that scores image by image."""

    def check(self, batch: PackedBatch) -> None:
        """Raise `RunError` if a target in `batch` is invalid."""
        ...

    def held_out_rows(self, outputs: Tensor, batch: PackedBatch) -> Mapping[str, Tensor]:
        """Return named scores of each image [I]."""
        ...


class ImageScores:
    """An objective for `zeta.train.evaluation.evaluate` that keeps the row of every image.

    Args:
        objective: scores the images of a pack.
        world: the ranks.
        independent: whether each class is a yes or no of its own (sigmoid); else they exclude one
            another (softmax).
        with_names: also keep `key`, `predicted` (the most probable class) and its `probability`.
    """

    headline = "top1"

    def __init__(
        self,
        objective: RowObjective,
        world: World,
        *,
        independent: bool = False,
        with_names: bool = False,
    ) -> None:
        self._objective, self._world = objective, world
        self._independent, self._with_names = independent, with_names
        self._parts: list[Columns] = []
        self.rows: dict[str, NDArray[Any]] = {}
        """Scores and `label` of all images, [n] each, in order of `sample_id`, on every rank."""

    def check(self, batch: PackedBatch) -> None:
        """Check the targets of a pack."""
        self._objective.check(batch)

    def tally(self) -> ImageScores:
        """Return itself, emptied."""
        self._parts, self.rows = [], {}
        return self

    def add(self, outputs: Tensor, batch: PackedBatch) -> None:
        """Keep the scores of the images of weight 1 of a pack."""
        found = {"sample_id": batch.sample_ids, "label": batch.labels}
        columns = found | dict(self._objective.held_out_rows(outputs, batch))
        counted = (batch.weights > 0).cpu().numpy()
        part = {n: column.cpu().numpy()[counted] for n, column in columns.items()}
        if self._with_names:
            logits = outputs.float()
            shares = logits.sigmoid() if self._independent else logits.softmax(dim=-1)
            best = shares.max(dim=-1)
            keys = [key for key, used in zip(batch.keys, counted.tolist(), strict=False) if used]
            part["key"] = np.array(keys, object)
            part["predicted"] = logits.argmax(dim=-1).cpu().numpy()[counted]
            part["probability"] = best.values.cpu().numpy()[counted]
        self._parts.append(part)

    def metrics(self) -> dict[str, float]:
        """Return `images` and the means over those of all ranks. NOTE: a collective."""
        self.rows = rows_in_order(self._parts, self._world)
        images = len(self.rows["sample_id"])
        if images == 0:
            return {"images": 0.0}
        return {"images": float(images)} | means_over(self.rows, np.ones(images, dtype=np.bool_))


def means_over(rows: Columns, chosen: NDArray[np.bool_]) -> dict[str, float]:
    """Return the mean of each score over the chosen rows, at least one."""
    scores = (name for name in rows if name not in _NO_SCORES)
    return {name: float(rows[name][chosen].astype(np.float64).mean()) for name in scores}
