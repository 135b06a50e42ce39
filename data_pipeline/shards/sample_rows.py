"""Rows of several mapped arrays as one, so that a manifest of many folders stays on disk."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[Any]
"""Rows of a structured dtype, or a plain column."""


class SampleRows:
    """Arrays of one dtype end to end, read like one array without being copied."""

    def __init__(self, parts: Sequence[Rows | SampleRows]) -> None:
        flat = [p.parts if isinstance(p, SampleRows) else (p,) for p in parts]
        self.parts: tuple[Rows, ...] = tuple(part for inner in flat for part in inner)
        self.dtype = self.parts[0].dtype
        self._ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        """Return a row (int), rows (array of ids, or slice) or a column of all rows (name)."""
        if isinstance(index, str):
            return np.concatenate([part[index] for part in self.parts])
        if isinstance(index, slice):
            return self._gather(np.arange(*index.indices(len(self))))
        if isinstance(index, int | np.integer):
            return self._gather(np.array([index]))[0]
        return self._gather(np.asarray(index))

    def _gather(self, ids: NDArray[np.int64]) -> Rows:
        rows = np.empty(len(ids), dtype=self.dtype)
        part_of = np.searchsorted(self._ends, ids, side="right")
        for number in np.unique(part_of).tolist():
            mine = part_of == number
            part = self.parts[number]
            rows[mine] = part[ids[mine] - (self._ends[number] - len(part))]
        return rows


def join_rows(parts: Sequence[Rows | SampleRows]) -> Rows | SampleRows:
    """Return the rows of all parts in order; a single part is returned unchanged."""
    return parts[0] if len(parts) == 1 else SampleRows(parts)


def release_pages(samples: Rows | SampleRows) -> None:
    """Release the memory through which mapped rows were read."""
    for part in samples.parts if isinstance(samples, SampleRows) else (samples,):
        base: object = part
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            base.madvise(mmap.MADV_DONTNEED)
