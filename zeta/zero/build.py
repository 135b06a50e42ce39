"""Models that no single rank can hold: built shard by shard for ZeRO-3.

Under DeepSpeed's `zero.Init` every layer's weights are sharded as soon as the layer is made. Their
values come afterwards, one parameter at a time, from rank 0: the same as those of a model that was
built whole, because an initial value depends on the seed, the name and the shape alone.
"""

from __future__ import annotations

from collections.abc import Callable

import deepspeed
import torch
from torch import nn

from zeta.distributed import World
from zeta.models.initialization import initial_values
from zeta.models.trainable import freeze
from zeta.zero.config import ZeroConfig, deepspeed_config


def build_for_training(
    build: Callable[[], nn.Module], zero: ZeroConfig, world: World, *, trainable: str, seed: int
) -> nn.Module:
    """Return `build()`, with its weights sharded over the ranks from the start at ZeRO-3.

    What `trainable` (as `train.trainable`) leaves out is frozen.

    Every rank calls this with the same `build`, whose result takes its values from `seed`.
    No rank ever holds more than one parameter in full besides its shards.
    """
    if zero.stage < 3:
        model = build()
        freeze(model, trainable)
        return model
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config(zero, world.size)):
        model = build()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in initial_values(model, seed):
            # NOTE: a collective; every rank walks the parameters in the same order.
            with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0):
                if world.is_main:
                    parameters[name].copy_(value)
    freeze(model, trainable)
    return model
