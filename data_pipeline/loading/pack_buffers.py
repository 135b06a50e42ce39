"""Shared memory through which executor processes return patches."""

from __future__ import annotations

import mmap
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.loading.executor import ExecutedPack


class PackBuffers:
    """Slots for the patches of the packs in flight, used in turn for the whole run.

    Separate memory for each pack would cost a file, a mapping and a fault for each page, in the
    executor and again here. This memory has no name: only processes forked from this one share it,
    and it needs no room in /dev/shm.
    """

    def __init__(self, slots: int, token_budget: int, patch_bytes: int) -> None:
        """Allocate `slots` arrays of [token_budget, patch_bytes] uint8."""
        memory = mmap.mmap(-1, slots * token_budget * patch_bytes)
        flat = np.frombuffer(memory, dtype=np.uint8)
        self._slots = flat.reshape(slots, token_budget, patch_bytes)

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, slot: int) -> NDArray[np.uint8]:
        """Return a slot, [token_budget, patch_bytes] uint8, for an executor to write to."""
        array: NDArray[np.uint8] = self._slots[slot]
        return array

    @staticmethod
    def strip(pack: ExecutedPack) -> ExecutedPack:
        """Return the pack without its patches, which stay in their slot."""
        return replace(pack, batch=replace(pack.batch, patches=pack.batch.patches[:0]))

    def join(self, slot: int, pack: ExecutedPack) -> ExecutedPack:
        """Return a stripped pack with a copy of its patches; the slot may then be reused."""
        patches = torch.from_numpy(self._slots[slot].copy())
        return replace(pack, batch=replace(pack.batch, patches=patches))
