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
from zeta.engine import deepspeed_config
from zeta.initialization import initial_values
from zeta.train_config import TrainConfig
from zeta.trainable import freeze


def build_for_training(
    build: Callable[[], nn.Module], train: TrainConfig, world: World
) -> nn.Module:
    """Return `build()`, with its weights sharded over the ranks from the start at ZeRO-3.

    What `train.trainable` leaves out is frozen.

    Every rank calls this with the same `build`, whose result takes its values from `train.seed`.
    No rank ever holds more than one parameter in full besides its shards.
    """
    if train.zero_stage < 3:
        model = build()
        freeze(model, train.trainable)
        return model
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config(train, world.size)):
        model = build()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in initial_values(model, train.seed):
            # NOTE: a collective; every rank walks the parameters in the same order.
            with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0):
                if world.is_main:
                    parameters[name].copy_(value)
    freeze(model, train.trainable)
    return model
