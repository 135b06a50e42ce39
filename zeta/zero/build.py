"""Build models for ZeRO-3 shard by shard, even those too large for a single rank.

Under DeepSpeed's `zero.Init` every layer's weights are sharded as soon as the layer is made. Their
values come afterwards from rank 0, one parameter at a time. They equal those of a model that was
built whole, because an initial value depends only on the seed, the name and the shape.
"""

from __future__ import annotations

from collections.abc import Callable

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from zeta.distributed import World
from zeta.models.initialization import initial_values
from zeta.models.trainable import freeze
from zeta.zero.config import ZeroConfig, deepspeed_config


def build_for_training(
    build: Callable[[], nn.Module], zero: ZeroConfig, world: World, *, trainable: str, seed: int
) -> nn.Module:
    """Return `build()`, with its weights sharded over the ranks from the start at ZeRO-3.

    The parameters that `trainable` (see `train.trainable`) leaves out are frozen.

    Every rank calls this with the same `build`, whose result takes its values from `seed`.
    No rank ever has more than one full parameter in memory besides its shards.
    """
    if zero.stage < 3:
        model = build()
        freeze(model, trainable)
        return model
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config(zero, world.size)):
        model = build()
    parameters = dict(model.named_parameters())
    for name, value in initial_values(model, seed):
        set_from_main(parameters[name], value, world)
    freeze(model, trainable)
    return model


@torch.no_grad()
def set_from_main(tensor: Tensor, value: Tensor | None, world: World) -> None:
    """Set a parameter or buffer of every rank, whole or sharded, to rank 0's `value`.

    NOTE: a collective; every rank walks the tensors in the same order.

    Args:
        tensor: of a model, before its engine is built.
        value: of the full shape; ignored on other ranks than rank 0.
        world: the ranks.
    """
    if hasattr(tensor, "ds_id"):  # sharded by zero.Init
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
            if world.is_main and value is not None:
                tensor.copy_(value)
        return
    on_device = tensor.to(world.device)
    if world.is_main and value is not None:
        on_device.copy_(value)
    dist.broadcast(on_device, src=0)
    tensor.copy_(on_device)
