"""Choose how a step is executed: the ZeRO stage, and how many packs go through a forward pass.

Neither changes a result. Both are chosen by the memory model (`zeta.train.memory_model`), whose
figures for a B/16 on an H200 were 5.2 and 27.0 GiB where 5.3 and 27.4 GiB were measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zeta.config_field import AUTO
from zeta.train.hardware import RESERVE_GIB

_GIB = 2**30
_FLAT = 65_536 * 768
"""Tokens times channels of a forward pass from which a GPU computes no faster: measured on an H200
with a B/16; the smaller a model is, the more tokens occupy the device."""
_ON_CPU = 1
"""Packs of a forward pass that are fastest on a CPU."""


@dataclass(frozen=True)
class Need:
    """The memory of one rank, in bytes, as the memory model predicts it."""

    states: Callable[[int], int]
    """Weights, gradients, optimizer and buffers at a ZeRO stage."""
    activations: int
    """Activations of one pack, forward and backward."""

    def total(self, stage: int, packs: int) -> int:
        """Return the bytes at a ZeRO stage with a number of packs in a forward pass."""
        return self.states(stage) + packs * self.activations


@dataclass(frozen=True)
class Execution:
    """How the steps of a run are executed."""

    stage: int
    """ZeRO stage."""
    packs: int
    """Packs in a forward pass, at most."""


def packs_per_forward(tokens: Any, token_budget: int) -> int:
    """Return how many packs `train.tokens_per_forward` joins where nothing else was chosen.

    Args:
        tokens: the setting; auto stands for what is fastest on a CPU.
        token_budget: tokens of a pack.

    Raises:
        ValueError: a single pack has more tokens.
    """
    if tokens == AUTO:
        return _ON_CPU
    if tokens < token_budget:
        raise ValueError(
            f"train.tokens_per_forward is {tokens}, less than one pack (data.token_budget = "
            f"{token_budget}): set it to a multiple of that, or to auto"
        )
    return int(tokens) // token_budget
