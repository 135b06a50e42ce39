"""Weights and optimizer state in DeepSpeed's files, read by any number of ranks at any ZeRO stage.

DeepSpeed writes, for each rank, flat fp32 tensors with pieces of many parameters. Here each
parameter is put together again as a list of pieces on memory-mapped files, and a rank that loads
(`load_into`) copies only the ranges that it owns in the new layout. So one path serves the same and
a changed world size or stage, reads every byte once, and needs no conversion on disk.
(DeepSpeed 0.19.8's own universal checkpoints, at stage 3, count Adam's steps once per parameter
group and give every group the weight decay of the first.)

File layouts: deepspeed/runtime/zero/stage_1_and_2.py and stage3.py, `state_dict`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zeta.stored_tensors import load_records
from zeta.zero.protocol import ShardedEngine
from zeta.zero.requirements import check_library
from zeta.zero.unnamed_order import unnamed_order

WEIGHTS, AVERAGE = "fp32", "average"
_COUNTS = ("step", "mu_product")
"""State that an optimizer keeps once a parameter; all other state is kept for every weight."""
_RANK = re.compile(r"_pp_rank_(\d+)_")


@dataclass
class _Flat:
    """One flat parameter state, as pieces in order."""

    pieces: list[Tensor] = field(default_factory=list)

    def parts(self, start: int, length: int) -> list[Tensor]:
        """Return elements `start` to `start + length`, as views of the pieces they lie in."""
        found = []
        for piece in self.pieces:
            low, high = max(start, 0), min(start + length, piece.numel())
            if low < high:
                found.append(piece[low:high])
            start -= piece.numel()
        return found


class ZeroState:
    """The full state of every parameter of a checkpoint, read lazily."""

    def __init__(
        self,
        folder: Path,
        stage: int,
        shapes: Mapping[str, list[int]],
        averages: Path,
        frozen: Collection[str] = (),
        order: Sequence[str] | None = None,
    ) -> None:
        """Open the files without reading the tensors.

        Args:
            folder: `zero/` of a checkpoint directory.
            stage: ZeRO stage that wrote it.
            shapes: full shape of every parameter, in the order of the module.
            averages: folder of the averaged weights, which need not exist.
            frozen: parameters that do not learn; they have weights only.
            order: names of the trainable parameters in the optimizer's order, which identify
                the moments of stage 0; None: an old checkpoint without this list.
        """
        self.shapes = shapes
        self._trained = {name: shape for name, shape in shapes.items() if name not in frozen}
        self._order = order
        self._states: dict[str, dict[str, _Flat]] = {}
        self.counts: dict[str, Tensor] = {}
        """Counts of the optimizer, the same for all parameters: its updates as `step`."""
        models = [_load(path) for path in _by_rank(folder.glob("*model_states.pt"))]
        self.buffers: dict[str, Tensor] = {
            name: models[0]["module"][name] for name in models[0]["buffer_names"]
        }
        if stage == 0:
            self._add_unsharded(models[0])
        for name in frozen:
            self._add_frozen(name, models, sharded=stage == 3)
        for path in _by_rank(folder.glob("*optim_states.pt")):
            shard = _load(path)["optimizer_state_dict"]
            if stage == 3:
                self._add_stage_3(shard, models[0]["param_shapes"])
            else:
                self._add_stage_1_2(shard)
        self.has_average = averages.is_dir()
        """Whether the moving average of the weights is there."""
        if self.has_average:
            self._add_averages(averages)

    @property
    def moments(self) -> list[str]:
        """Names of the values that the optimizer keeps for weights, as AdamW's exp_avg."""
        return [key for key in self._states if key not in (WEIGHTS, AVERAGE)]

    def moments_of(self, name: str) -> list[str]:
        """Return the names of the values that the optimizer keeps for parameter `name`.

        Muon keeps others for a matrix than for a norm. Where some or all values of a parameter are
        missing they are named too, so that reading them fails.
        """
        present = {key for key in self.moments if self._states[key][name].pieces}
        together = [kept for kept in self._kept_together if kept & present]
        wanted = frozenset[str]().union(*together) if together else set(self.moments)
        return [key for key in self.moments if key in wanted]

    @cached_property
    def _kept_together(self) -> set[frozenset[str]]:
        """The sets of values that the optimizer keeps for a parameter."""
        return {
            frozenset(key for key in self.moments if self._states[key][name].pieces)
            for name in self._trained
        }

    def read(self, name: str, key: str, start: int, length: int) -> Tensor:
        """Return elements of one state of parameter `name`, flat: WEIGHTS, AVERAGE or a moment."""
        found = self._states[key][name].parts(start, length)
        _require(length, found, name)
        return _joined(found) if len(found) != 1 else found[0]

    def full(self, name: str, key: str = WEIGHTS) -> Tensor:
        """Return one fp32 state of parameter `name` in its whole shape, a copy.

        The average of a frozen parameter is the parameter. Read one after the other, all parameters
        take the memory of the largest.
        """
        shape = self.shapes[name]
        if key == AVERAGE and name not in self._trained:
            key = WEIGHTS
        found = self._states[key][name].parts(0, math.prod(shape))
        _require(math.prod(shape), found, name)
        return _joined(found).reshape(shape)

    def _add_averages(self, folder: Path) -> None:
        pieces: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in self.shapes}
        for path in folder.iterdir():
            for name, (start, piece) in _load(path).items():
                pieces[name].append((start, piece))
        for name, found in pieces.items():
            self._of(AVERAGE, name).extend(piece for _, piece in sorted(found, key=_start))

    def _add_frozen(self, name: str, models: list[dict[str, Any]], *, sharded: bool) -> None:
        whole = models[0]["module"][name] if not sharded else None
        pieces = [m["frozen_param_fragments"][name] for m in models] if whole is None else [whole]
        left = math.prod(self.shapes[name])  # the last shards end in padding
        for piece in pieces:
            self._of(WEIGHTS, name).append(piece.flatten()[:left])
            left = max(0, left - piece.numel())

    def _add_unsharded(self, model: Mapping[str, Any]) -> None:
        for name in self._trained:
            self._of(WEIGHTS, name).append(model["module"][name].flatten())
        ordered = self._order or unnamed_order(self._trained)
        for index, state in model["optimizer"]["state"].items():
            for key, value in self._per_weight(state).items():
                self._of(key, ordered[index]).append(value.flatten())

    def _add_stage_1_2(self, shard: Mapping[str, Any]) -> None:
        optimizer = shard["base_optimizer_state"]["state"]
        for group, pieces in enumerate(shard["param_slice_mappings"]):
            flats = self._flats(shard["single_partition_of_fp32_groups"][group], optimizer, group)
            for name, address in pieces.items():
                for key, flat in flats.items():
                    piece = flat[address.start : address.start + address.numel]
                    self._of(key, name).append(piece)

    def _add_stage_3(self, shard: Mapping[str, Any], groups: list[Mapping[str, Any]]) -> None:
        optimizer = shard["optimizer_state_dict"]["state"]
        ranks = shard["partition_count"]
        for group, names in enumerate(groups):
            flats = self._flats(shard["fp32_flat_groups"][group], optimizer, group)
            offset = 0
            for name in names:
                total = math.prod(self.shapes[name])
                share = math.ceil(total / ranks)
                for key, flat in flats.items():
                    pieces = self._of(key, name)
                    present = sum(piece.numel() for piece in pieces)
                    real = min(share, total - present)  # the last shards end in padding
                    pieces.append(flat[offset : offset + real])
                offset += share

    def _of(self, key: str, name: str) -> list[Tensor]:
        """Return the pieces of one state of one parameter, to add to."""
        if key not in self._states:
            self._states[key] = {name: _Flat() for name in self.shapes}
        return self._states[key][name].pieces

    def _per_weight(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the values that an optimizer keeps for every weight, and note its counts."""
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        self.counts |= {key: value for key, value in tensors.items() if key in _COUNTS}
        return {key: value for key, value in tensors.items() if key not in _COUNTS}

    def _flats(
        self, weights: Tensor, optimizer: Mapping[int, Mapping[str, Any]], group: int
    ) -> dict[str, Tensor]:
        flats = {WEIGHTS: weights}
        if group in optimizer:  # absent before the first applied step
            flats |= self._per_weight(optimizer[group])
        return flats


@torch.no_grad()
def load_into(engine: ShardedEngine, state: ZeroState) -> None:
    """Copy the weights, buffers and optimizer state of a checkpoint into an engine.

    Args:
        engine: on the module and optimizer that the state is of; every rank passes its own.
        state: the checkpoint, written by any number of ranks at any stage.
    """
    for owned in engine.owned_ranges():
        record = engine.optimizer_state(owned.flat)
        for key, value in state.counts.items():
            record[key] = value.to(owned.flat.device, copy=True)
        moments = state.moments_of(owned.name)
        for key in moments:
            if key not in record:
                record[key] = torch.zeros_like(owned.flat)
        targets = {WEIGHTS: owned.flat.data} | {key: record[key] for key in moments}
        for key, target in targets.items():
            owned.of(target).copy_(state.read(owned.name, key, owned.start, owned.length))
    for name, buffer in engine.module.named_buffers():
        if name in state.buffers:
            buffer.copy_(state.buffers[name])
    engine.weights_changed()


def _joined(pieces: list[Tensor]) -> Tensor:
    return torch.cat(pieces) if pieces else torch.empty(0)  # a parameter without elements


def _require(length: int, found: Sequence[Tensor], name: str) -> None:
    present = sum(piece.numel() for piece in found)
    if present != length:
        raise ValueError(
            f"the files of the checkpoint have {present} of {length} values of {name}: they were "
            "changed since they were saved; move it away to go on from the one before it"
        )


def _start(piece: tuple[int, Tensor]) -> int:
    return piece[0]


def _by_rank(paths: Iterator[Path]) -> list[Path]:
    def rank(path: Path) -> int:
        match = _RANK.search(path.name)
        return int(match.group(1)) if match else 0

    return sorted(paths, key=rank)


def _load(path: Path) -> dict[str, Any]:
    check_library()
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # The three plain records that DeepSpeed writes beside tensors; nothing else is unpickled.
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        loaded: dict[str, Any] = load_records(path, mmap=True)
    return loaded
