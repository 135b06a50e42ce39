"""Let frozen weights of a model follow others as a moving average (DINO, I-JEPA, CAPI).

Such a teacher is a frozen part of the model, unlike one that never changes: so it is sharded, saved
and resumed with it. `DeclaredObjective.finish_step` is where it follows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the weights of `average` towards those of `model`: a = decay a + (1 - decay) m.

    Args:
        average: a frozen part of the model that is trained.
        model: another part of it, with the same weights in the same order; both whole, or both
            sharded in the same way (ZeRO-3), of which each rank moves its share.
        decay: in [0, 1].
    """
    for followed, following in zip(model.parameters(), average.parameters(), strict=True):
        for source, target in zip(_held(followed), _held(following), strict=True):
            target.lerp_(source.to(target.dtype), 1 - decay)


def _held(parameter: nn.Parameter) -> list[Tensor]:
    """Return what this rank holds of a parameter: its shard, the whole of it, or both."""
    shard: Tensor | None = getattr(parameter, "ds_tensor", None)
    whole = parameter.detach()
    return [part for part in (shard, whole) if part is not None and part.numel()]
