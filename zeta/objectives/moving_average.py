"""Let frozen weights of a model follow others as a moving average (DINO, I-JEPA, CAPI).

Such a teacher is a frozen part of the model, unlike one that never changes: so it is sharded, saved
and resumed with it. `DeclaredObjective.start` is where it begins as its student, and `finish_step`
where it follows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


@torch.no_grad()
def begin_as(average: nn.Module, model: nn.Module) -> None:
    """Give `average` the weights and buffers of `model`, exactly.

    Args:
        average: a frozen part of the model that is trained.
        model: another part of it, of the same kind; see `follow`.
    """
    for source, target in _pairs(average, model):
        target.copy_(source)
    for buffer, own in zip(model.buffers(), average.buffers(), strict=True):
        own.copy_(buffer)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the weights of `average` towards those of `model`: a = decay a + (1 - decay) m.

    Args:
        average: a frozen part of the model that is trained.
        model: another part of it, with the same weights in the same order; both whole, or both
            sharded in the same way (ZeRO-3), of which each rank moves its share.
        decay: in [0, 1].
    """
    for source, target in _pairs(average, model):
        target.lerp_(source.to(target.dtype), 1 - decay)


def _pairs(average: nn.Module, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what this rank holds of each parameter: of `model`, and of `average`."""
    for followed, following in zip(model.parameters(), average.parameters(), strict=True):
        yield from zip(_held(followed), _held(following), strict=True)


def _held(parameter: nn.Parameter) -> list[Tensor]:
    """Return what this rank holds of a parameter: its shard, the whole of it, or both."""
    shard: Tensor | None = getattr(parameter, "ds_tensor", None)
    whole = parameter.detach()
    return [part for part in (shard, whole) if part is not None and part.numel()]
