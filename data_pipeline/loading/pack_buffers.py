"""Shared memory through which executor processes return patches and their coordinates."""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.loading.executor import ExecutedPack

_ALIGNED = 64
_COORDS_BYTES = 8  # two int32 a token


_Held = tuple[int, weakref.ref[NDArray[np.uint8]], weakref.ref[NDArray[np.int32]]]


def _is_used(held: _Held) -> bool:
    return held[1]() is not None or held[2]() is not None


class PackBuffers:
    """Slots for the patches and coordinates of packs, used in turn for the whole run.

    Separate memory for each pack would cost a file, a mapping and a fault for each page, in the
    executor and again here. This memory has no name: only processes forked from this one share it,
    and it needs no room in /dev/shm.

    A pack that came back is not copied: its tensors lie in their slot, which is taken for another
    pack once nothing refers to them any more. A slot that was never taken costs no memory.
    """

    def __init__(self, slots: int, token_budget: int, patch_bytes: int) -> None:
        """Allocate `slots` slots for C = `token_budget` patches of `patch_bytes` each."""
        self._coords_bytes, patches = token_budget * _COORDS_BYTES, token_budget * patch_bytes
        slot_bytes = -(-(self._coords_bytes + patches) // _ALIGNED) * _ALIGNED
        self._shape, self._used = (token_budget, patch_bytes), self._coords_bytes + patches
        self._slots = np.frombuffer(mmap.mmap(-1, slots * slot_bytes), dtype=np.uint8)
        self._slots = self._slots.reshape(slots, slot_bytes)
        self._free = list(reversed(range(slots)))
        self._held = deque[_Held]()

    def take(self) -> int | None:
        """Return a slot that nothing uses, for an executor to write to; None: there is none."""
        # Packs are let go in the order in which they came, or nearly: the oldest are looked at.
        while self._held and not _is_used(self._held[0]):
            self._free.append(self._held.popleft()[0])
        if not self._free:
            let_go = [held[0] for held in self._held if not _is_used(held)]
            self._held = deque(held for held in self._held if held[0] not in let_go)
            self._free += let_go
        return self._free.pop() if self._free else None  # the last one freed: still in caches

    def patches(self, slot: int) -> NDArray[np.uint8]:
        """Return the patches of a slot, [C, patch_bytes] uint8."""
        array: NDArray[np.uint8] = self._slots[slot, self._coords_bytes : self._used]
        return array.reshape(self._shape)

    def coords(self, slot: int) -> NDArray[np.int32]:
        """Return the coordinates of a slot, [C, 2] int32."""
        return self._slots[slot, : self._coords_bytes].view(np.int32).reshape(-1, 2)

    def strip(self, slot: int, pack: ExecutedPack) -> ExecutedPack:
        """Return a pack, made with the patches of a slot, without what then lies in the slot."""
        self.coords(slot)[:] = pack.batch.coords.numpy()
        batch = replace(pack.batch, patches=pack.batch.patches[:0], coords=pack.batch.coords[:0])
        return replace(pack, batch=batch)

    def join(self, slot: int, pack: ExecutedPack) -> ExecutedPack:
        """Return a stripped pack with its tensors, which lie in the slot as long as they live."""
        patches, coords = self.patches(slot), self.coords(slot)
        # A tensor keeps its array alive, as does every tensor that shares its memory.
        self._held.append((slot, weakref.ref(patches), weakref.ref(coords)))
        tensors = torch.from_numpy(patches), torch.from_numpy(coords)
        return replace(pack, batch=replace(pack.batch, patches=tensors[0], coords=tensors[1]))
