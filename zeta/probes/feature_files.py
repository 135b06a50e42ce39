"""Features of images on disk and in order, written by any number of ranks in little memory.

Each rank writes the rows of its images at their places in one file. Only a key, a label and a row
number of each image are kept in memory. The file is written to by position and not mapped: on a
network file system, two machines that map one page overwrite each other's rows.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from zeta.distributed import World
from zeta.packed import PackedBatch
from zeta.probes.rows import Columns, rows_in_order

FEATURES_NAME = "features.npy"
KEYS_NAME = "keys.txt"
LABELS_NAME = "labels.npy"
_UNORDERED = ".features.raw"
_CHUNK_BYTES = 1 << 24
_LINE_BREAKS = str.maketrans({"\n": "\\n", "\r": "\\r"})


class FeatureFiles:
    """An objective for `zeta.train.evaluation.evaluate` that keeps the features of every image.

    Args:
        folder: folder that all ranks see. It gets `features.npy` [n, dim] float32, `labels.npy` [n]
            int64 (-1: no label) and `keys.txt` (one a line), in order of sample id.
        world: the ranks.
    """

    headline = "images"

    def __init__(self, folder: Path, world: World) -> None:
        self._folder, self._world = folder, world
        self._parts: list[Columns] = []
        file = os.open(folder / _UNORDERED, os.O_RDWR | os.O_CREAT, 0o644)  # of all ranks
        self._file = os.fdopen(file, "r+b")

    def check(self, batch: PackedBatch) -> None:
        """Accept any pack: features need no target."""

    def tally(self) -> FeatureFiles:
        """Return itself."""
        return self

    def add(self, outputs: Tensor, batch: PackedBatch) -> None:
        """Write the features [I, dim] of the images of weight 1."""
        counted = (batch.weights > 0).cpu().numpy()
        features = outputs.float().cpu().numpy()[counted]
        ids, labels = batch.sample_ids.cpu().numpy()[counted], batch.labels.cpu().numpy()[counted]
        keys = [key for key, used in zip(batch.keys, counted.tolist(), strict=False) if used]
        self._parts.append({"sample_id": ids, "label": labels, "key": np.array(keys, object)})
        self._dim = features.shape[1]
        for sample_id, row in zip(ids.tolist(), features, strict=True):
            self._file.seek(sample_id * row.nbytes)
            self._file.write(row.tobytes())

    def metrics(self) -> dict[str, float]:
        """Put the files in order, on rank 0, and return `images`. NOTE: a collective."""
        self._file.close()
        rows = rows_in_order(self._parts, self._world)
        images = len(rows["sample_id"])
        if self._world.is_main and images:
            self._write_features(rows["sample_id"])
            np.save(self._folder / LABELS_NAME, rows["label"])
            with (self._folder / KEYS_NAME).open("w", encoding="utf-8") as stream:
                stream.writelines(f"{key.translate(_LINE_BREAKS)}\n" for key in rows["key"])
        self._world.barrier()  # NOTE: nobody reads before rank 0 has written
        return {"images": float(images)}

    def _write_features(self, ids: NDArray[np.int64]) -> None:
        """Write the rows of `ids`, which ascend, without the gaps between them."""
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(ids), self._dim)}
        rows_at_once = max(1, _CHUNK_BYTES // (4 * self._dim))
        unordered, shape = self._folder / _UNORDERED, (int(ids[-1]) + 1, self._dim)
        with (self._folder / FEATURES_NAME).open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for start in range(0, len(ids), rows_at_once):
                # Mapped anew for each chunk, so that the pages of the last one leave the memory.
                rows = np.memmap(unordered, np.float32, "r", shape=shape)
                stream.write(rows[ids[start : start + rows_at_once]].tobytes())
        unordered.unlink()
