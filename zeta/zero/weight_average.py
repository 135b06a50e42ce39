"""Exponential moving average of the weights, sharded over the ranks as the weights are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zeta.zero.layout import HeldRange, flat_weights, held_ranges, weights_changed
from zeta.zero.state import AVERAGE, ZeroState


class WeightAverage:
    """The average of what this rank holds of the fp32 weights, updated after every applied step.

    At ZeRO 1 to 3 a rank averages its own shard, which takes 4 bytes a weight over all ranks
    together; at stage 0 every rank averages all. Nothing is communicated.
    """

    def __init__(self, engine: Any, stage: int, decay: float) -> None:
        """Begin an average at the weights of a `DeepSpeedEngine` as they are."""
        self._engine, self._stage, self.decay = engine, stage, decay
        self._held = held_ranges(engine, stage)
        self._flats = flat_weights(engine, stage)
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
        weights of the start are soon forgotten: the warm-up of TensorFlow's moving averages.
        """
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averages, [flat.data for flat in self._flats], 1.0 - decay)
        self.updates += 1

    def pieces(self) -> dict[str, tuple[int, Tensor]]:
        """Return what this rank has to save: by parameter, where its piece begins, and the piece.

        A weight that every rank holds is saved by rank 0.
        """
        if self._stage == 0 and torch.distributed.get_rank() != 0:
            return {}
        return {held.name: (held.start, self._of(held)) for held in self._held}

    @torch.no_grad()
    def load(self, state: ZeroState, updates: int) -> None:
        """Go on with the average of a checkpoint, or from its weights, loaded before, if it has
        none.
        """
        if not state.has_average:
            torch._foreach_copy_(self._averages, [flat.data for flat in self._flats])
            self.updates = 0
            return
        for held in self._held:
            self._of(held).copy_(state.read(held.name, AVERAGE, held.start, held.length))
        self.updates = updates

    @contextmanager
    def as_weights(self) -> Iterator[None]:
        """Within, the model computes with the average; afterwards its weights are back, bit by bit.

        Every rank enters and leaves together, and nobody trains within.
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
        weights_changed(self._engine, self._stage)

    def _of(self, held: HeldRange) -> Tensor:
        return held.of(self._average_of[id(held.flat)])
