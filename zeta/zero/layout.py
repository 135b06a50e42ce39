"""Where a running DeepSpeed engine holds its weights, at any ZeRO stage.

Each rank holds flat fp32 tensors (at stage 0: every parameter whole), of which it knows which range
of which parameter lies where. Loading, averaging and swapping of weights go through this map alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zeta.zero.state import WEIGHTS, ZeroState


@dataclass(frozen=True)
class HeldRange:
    """The range of one parameter that this rank holds, inside a flat tensor of the optimizer."""

    name: str
    flat: Tensor
    """The fp32 tensor that the optimizer updates."""
    offset: int
    """Where the range begins in `flat`."""
    start: int
    """Where it begins in the flattened parameter."""
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the range as a view of `flat`, a tensor laid out as `self.flat`."""
        return flat.view(-1)[self.offset : self.offset + self.length]


def held_ranges(engine: Any, stage: int) -> list[HeldRange]:
    """Return what this rank holds of every trainable parameter.

    Args:
        engine: a `DeepSpeedEngine`.
        stage: its ZeRO stage.
    """
    if stage == 0:  # the optimizer has the parameters themselves
        named = engine.module.named_parameters()
        return [HeldRange(n, p, 0, 0, p.numel()) for n, p in named if p.requires_grad]
    find = _ranges_of_stage_3 if stage == 3 else _ranges_of_stages_1_2
    return list(find(engine.module, engine.optimizer))


def flat_weights(engine: Any, stage: int) -> list[Tensor]:
    """Return the flat fp32 tensors of a `DeepSpeedEngine` that hold this rank's weights."""
    return list({id(held.flat): held.flat for held in held_ranges(engine, stage)}.values())


@torch.no_grad()
def load_into(engine: Any, stage: int, state: ZeroState) -> None:
    """Copy the weights, buffers and optimizer state that this rank holds into a DeepSpeed engine.

    Args:
        engine: a `DeepSpeedEngine`, on the module and optimizer that the state is of.
        stage: its ZeRO stage.
        state: the checkpoint.
    """
    inner = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    for held in held_ranges(engine, stage):
        own = inner.state[held.flat]
        for key, value in state.counts.items():
            own[key] = value.to(held.flat.device, copy=True)
        for key in state.moments:
            if key not in own:
                own[key] = torch.zeros_like(held.flat)
        targets = {WEIGHTS: held.flat.data} | {key: own[key] for key in state.moments}
        for key, target in targets.items():
            held.of(target).copy_(state.read(held.name, key, held.start, held.length))
    for name, buffer in engine.module.named_buffers():
        if name in state.buffers:
            buffer.copy_(state.buffers[name])
    weights_changed(engine, stage)


def weights_changed(engine: Any, stage: int) -> None:
    """Make what the forward reads follow the flat fp32 tensors, after these were written to.

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


# `module` and `optimizer` are Any for the attributes that DeepSpeed adds.


def _ranges_of_stage_3(module: Any, optimizer: Any) -> Iterator[HeldRange]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    flats = optimizer.fp32_partitioned_groups_flat
    for flat, group in zip(flats, optimizer.fp16_groups, strict=True):
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()
            start = size * torch.distributed.get_rank()
            length = max(0, min(size, parameter.ds_numel - start))
            yield HeldRange(names[id(parameter)], flat, offset, start, length)
            offset += size


def _ranges_of_stages_1_2(module: Any, optimizer: Any) -> Iterator[HeldRange]:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter._hp_mapping is not None:  # else on other ranks
            mapping = parameter._hp_mapping
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield HeldRange(name, flat, target.start, source.start, source.numel)
