"""Features of images, on disk and in order: written by any number of ranks, in little memory.

Each rank writes the rows of its images at their places in one file. Only a key, a label and a row
number of each image are kept in memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from zeta.distributed import World
from zeta.packed import PackedBatch

FEATURES_NAME = "features.npy"
KEYS_NAME = "keys.txt"
LABELS_NAME = "labels.npy"
_UNORDERED = ".features.raw"
_CHUNK_BYTES = 1 << 24
_LINE_BREAKS = str.maketrans({"\n": "\\n", "\r": "\\r"})


@dataclass(frozen=True)
class _Part:
    """Images of one pack."""

    sample_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    keys: list[str]


class FeatureFiles:
    """An objective for `zeta.train.evaluation.evaluate` that keeps the features of every image.

    Args:
        folder: that all ranks see, to write `features.npy` [n, dim] float32, `labels.npy` [n]
            int64 (-1: none) and `keys.txt` (a line each) into, in order of sample id.
        world: the ranks.
    """

    headline = "images"

    def __init__(self, folder: Path, world: World) -> None:
        self._folder, self._world = folder, world
        self._parts: list[_Part] = []
        self._file = os.open(folder / _UNORDERED, os.O_RDWR | os.O_CREAT, 0o644)

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
        self._parts.append(_Part(ids, labels, keys))
        for sample_id, row in zip(ids.tolist(), features, strict=True):
            _write_all(self._file, row.tobytes(), sample_id * row.nbytes)
        self._row_bytes = features.shape[1] * features.itemsize

    def metrics(self) -> dict[str, float]:
        """Put the files in order, on rank 0, and return `images`. NOTE: a collective."""
        ids = np.concatenate([part.sample_ids for part in self._parts])
        labels = np.concatenate([part.labels for part in self._parts])
        own = (ids, labels, [key for part in self._parts for key in part.keys])
        ranks: list[tuple[Any, Any, list[str]]] = self._world.gather(own)
        all_ids = np.concatenate([rank[0] for rank in ranks])
        if self._world.is_main and len(all_ids):
            order = np.argsort(all_ids)
            self._write_features(all_ids[order])
            np.save(self._folder / LABELS_NAME, np.concatenate([rank[1] for rank in ranks])[order])
            keys = [key for rank in ranks for key in rank[2]]
            with (self._folder / KEYS_NAME).open("w", encoding="utf-8") as stream:
                stream.writelines(f"{keys[i].translate(_LINE_BREAKS)}\n" for i in order.tolist())
        os.close(self._file)
        self._world.barrier()  # NOTE: nobody reads before rank 0 has written
        return {"images": float(len(all_ids))}

    def _write_features(self, ids: NDArray[np.int64]) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(ids), self._row_bytes // 4)}
        rows_at_once = max(1, _CHUNK_BYTES // self._row_bytes)
        with (self._folder / FEATURES_NAME).open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for start in range(0, len(ids), rows_at_once):
                for first, count in _runs(ids[start : start + rows_at_once]):
                    size = count * self._row_bytes
                    stream.write(os.pread(self._file, size, first * self._row_bytes))
        (self._folder / _UNORDERED).unlink()


def _runs(ids: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return (first, count) of each run of consecutive ascending ids."""
    starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 2) != 1)
    counts = np.diff(starts, append=len(ids))
    return list(zip(ids[starts].tolist(), counts.tolist(), strict=True))


def _write_all(file: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
