"""The way of packs to the device: pinned, joined, and copied while the device computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from zeta.packed import PackedBatch, join_packs


def forward_groups(packs: int, most: int) -> list[range]:
    """Return the packs of each forward pass: as few passes as `most` packs in each allow.

    The passes have equal numbers of packs where that costs no more than twice as many passes: a
    compiled block, a CUDA graph and an attention kernel are made for one shape.

    Args:
        packs: packs of this rank in a step.
        most: packs that may go through one forward pass.
    """
    fewest = -(-packs // max(1, most))
    equal = next(count for count in range(fewest, packs + 1) if packs % count == 0)
    count = equal if equal < 2 * fewest else fewest
    bounds = [packs * index // count for index in range(count + 1)]
    return [range(first, end) for first, end in pairwise(bounds)]


class PackFeed:
    """Joins the packs of each forward pass on a device, one pass ahead of the computation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def batches(self, groups: Sequence[Sequence[PackedBatch]]) -> Iterator[PackedBatch]:
        """Yield each group of packs joined, on the device; the next is copied meanwhile."""
        ahead = self._send(groups[0])
        for following in (*groups[1:], None):
            batch = self._received(ahead)
            if following is not None:
                ahead = self._send(following)
            yield batch

    def _send(self, packs: Sequence[PackedBatch]) -> PackedBatch:
        if self._stream is None:
            return join_packs(packs, self._device)
        with torch.cuda.stream(self._stream):
            return join_packs(packs, self._device)

    def _received(self, batch: PackedBatch) -> PackedBatch:
        """Let the computation wait for the copy, and keep its memory until it has been used."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            batch.record_stream(current)
        return batch
