"""Exponential moving average of the weights, sharded over the ranks as the weights are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from zeta.zero.protocol import OwnedRange, ShardedEngine, flat_weights
from zeta.zero.state import AVERAGE, ZeroState


class WeightAverage:
    """The average of the fp32 weights that this rank owns, updated after every applied step.

    A rank averages its own shard, which takes 4 bytes a weight over all ranks together; where
    nothing is sharded (ZeRO 0) every rank averages all. Nothing is communicated.
    """

    def __init__(self, engine: ShardedEngine, decay: float) -> None:
        """Start an average from the present weights of `engine`."""
        self._engine, self.decay = engine, decay
        self._flats = flat_weights(engine.owned_ranges())
        self._averages = [flat.detach().clone() for flat in self._flats]
        self._average_of = {
            id(flat): average for flat, average in zip(self._flats, self._averages, strict=True)
        }
        self.updates = 0
        """Steps averaged so far."""

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights.

        The n-th update (from 0) decays by min(decay, (1 + n) / (10 + n)), so that the random
        initial weights are soon forgotten: the warm-up of TensorFlow's moving averages.
        """
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averages, [flat.data for flat in self._flats], 1.0 - decay)
        self.updates += 1

    def pieces(self) -> dict[str, tuple[int, Tensor]]:
        """Return this rank's pieces to save: (first element, piece) by parameter.

        Rank 0 saves what every rank owns.
        """
        if self._engine.replicated and dist.get_rank() != 0:
            return {}
        return {owned.name: (owned.start, self._of(owned)) for owned in self._engine.owned_ranges()}

    @torch.no_grad()
    def load(self, state: ZeroState, updates: int) -> None:
        """Continue the average of a checkpoint.

        If it has none, start from the weights of the checkpoint, which must be loaded before.
        """
        if not state.has_average:
            torch._foreach_copy_(self._averages, [flat.data for flat in self._flats])
            self.updates = 0
            return
        for owned in self._engine.owned_ranges():
            self._of(owned).copy_(state.read(owned.name, AVERAGE, owned.start, owned.length))
        self.updates = updates

    @contextmanager
    def as_weights(self) -> Iterator[None]:
        """Replace the weights by the average inside the context, and restore them bit by bit.

        Every rank enters and leaves together, and no rank trains inside.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for flat, average in zip(self._flats, self._averages, strict=True):
            weights = flat.detach().clone()
            flat.data.copy_(average)
            average.copy_(weights)
        self._engine.weights_changed()

    def _of(self, owned: OwnedRange) -> Tensor:
        return owned.of(self._average_of[id(owned.flat)])
