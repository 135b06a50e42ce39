"""Find the fp32 weights of a running DeepSpeed engine, at any ZeRO stage.

Each rank has flat fp32 tensors (at stage 0: every parameter whole). The places of the parameters in
them are private to DeepSpeed; only this module knows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from zeta.zero.protocol import OwnedRange

# `engine`, `module` and `optimizer` are Any for the attributes that DeepSpeed adds.


def find_ranges(engine: Any, stage: int) -> list[OwnedRange]:
    """Return the ranges of the trainable parameters that this rank updates.

    Args:
        engine: a `DeepSpeedEngine`.
        stage: its ZeRO stage.
    """
    if stage == 0:  # the optimizer has the parameters themselves
        named = engine.module.named_parameters()
        return [OwnedRange(n, p, 0, 0, p.numel()) for n, p in named if p.requires_grad]
    find = _ranges_of_stage_3 if stage == 3 else _ranges_of_stages_1_2
    return list(find(engine.module, engine.optimizer))


def copy_to_forward(engine: Any, stage: int) -> None:
    """Make the weights that the forward pass reads equal to the flat fp32 tensors.

    Every rank calls this together.
    """
    optimizer = engine.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # every parameter is its shard alone
        for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
        optimizer.checkpoint_event_epilogue()  # small parameters are gathered again
    elif stage > 0:
        optimizer.update_lp_params()


def _ranges_of_stage_3(module: Any, optimizer: Any) -> Iterator[OwnedRange]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    flats = optimizer.fp32_partitioned_groups_flat
    for flat, group in zip(flats, optimizer.fp16_groups, strict=True):
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()
            start = size * torch.distributed.get_rank()
            length = max(0, min(size, parameter.ds_numel - start))
            yield OwnedRange(names[id(parameter)], flat, offset, start, length)
            offset += size


def _ranges_of_stages_1_2(module: Any, optimizer: Any) -> Iterator[OwnedRange]:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter._hp_mapping is not None:  # else on other ranks
            mapping = parameter._hp_mapping
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield OwnedRange(name, flat, target.start, source.start, source.numel)
