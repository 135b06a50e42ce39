"""DeepSpeed ZeRO 0 to 3 as a sharded engine (`zeta.zero.protocol.ShardedEngine`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from zeta.distributed import World
from zeta.models.linear import WeightCopies
from zeta.models.trainable import frozen_names
from zeta.zero.config import ZeroConfig, deepspeed_config
from zeta.zero.layout import copy_to_forward, find_ranges
from zeta.zero.passthrough import offloads_optimizer
from zeta.zero.protocol import OwnedRange, flat_weights
from zeta.zero.requirements import check_engine, check_ranges


class ZeroEngine:
    """A model and its optimizer on DeepSpeed."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, zero: ZeroConfig, world: World
    ) -> None:
        """Shard the model and its optimizer over the ranks.

        Args:
            model: on the device; the same on every rank, or built by `build_for_training`.
            optimizer: over its trainable parameters.
            zero: stage, dtype, packs and settings of DeepSpeed.
            world: the ranks.

        Raises:
            RunError: the installed DeepSpeed lacks something that zeta relies on.
        """
        self._stage, self._device = zero.stage, world.device
        # One gather a block, not one a layer. Behind a frozen part a block would be released too
        # early: its input needs no gradient, by which DeepSpeed sees the end of its backward.
        # A head without a part in training comes after all blocks.
        behind = [name for name in frozen_names(model) if "head" not in name.split(".")]
        if self._stage == 3 and not behind:
            set_z3_leaf_modules(model, list(block_types(model)), raise_if_not_found=False)
        self._offloaded = offloads_optimizer(zero.extra)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = optimizer.param_groups
        self.optimizer_order = [names[id(p)] for group in groups for p in group["params"]]
        self.versions: Mapping[str, str] = {"deepspeed": deepspeed.__version__}
        self.deepspeed: Any
        """DeepSpeed's engine."""
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(zero, world.size)
        )
        check_engine(self.deepspeed, self._stage)
        self._files = _Files()
        self.deepspeed.checkpoint_engine = self._files
        # save_checkpoint would put a conversion script beside the files.
        self.deepspeed._copy_recovery_script = lambda directory: None
        self._ranges = find_ranges(self.deepspeed, self._stage)
        if not self.replicated:
            check_ranges(self._ranges, self.module, world)
        self._adding: AbstractContextManager[None] | None = None
        """DeepSpeed's mode in which the backward passes of a step are reduced together."""
        self._copies: WeightCopies | None = None
        if zero.dtype == "bf16" and self._stage < 3:  # stage 3 gathers weights in bf16
            self._copies = WeightCopies(model, torch.bfloat16)

    @property
    def module(self) -> nn.Module:
        """The model, without DeepSpeed's wrapper; its parameters may be sharded."""
        module: nn.Module = self.deepspeed.module
        return module

    @property
    def replicated(self) -> bool:
        """Whether every rank owns all weights: at stage 0."""
        return self._stage == 0

    def forward(self, batch: object) -> Any:
        """Return the model's outputs; at stage 3 a collective."""
        return self.deepspeed(batch)

    def forward_as(self, function: Callable[[Any], Any], batch: object) -> Any:
        """Return `function(batch)`, run in the place of the model's own forward pass."""
        self.module.forward = function
        try:
            return self.deepspeed(batch)
        finally:
            del self.module.forward

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add to the gradients; after the last backward they are averaged over the ranks."""
        if self._stage == 1 and self._adding is None:
            self._adding = self.deepspeed.coalesce_grad_reduction()
            self._adding.__enter__()
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        if last and self._adding is not None:
            # NOTE: a collective, so it is not left by a `with`: a rank that fails in its backward
            # pass must not wait here for the others.
            adding, self._adding = self._adding, None
            adding.__exit__(None, None, None)
            self.deepspeed.set_gradient_accumulation_boundary(last)  # it was put back

    def gradients(self) -> list[Tensor]:
        """Return this rank's share of the averaged gradients: at stage 0, all of them."""
        if self.replicated:
            return [p.grad for p in self.module.parameters() if p.grad is not None]
        if self._offloaded:  # in host memory, beside the weights that the optimizer updates
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # the copies to there may be under way
            flats = flat_weights(self._ranges)
            return [flat.grad for flat in flats if flat.grad is not None]
        shards = self.deepspeed.optimizer.averaged_gradients.values()
        return [shard for group in shards for shard in group if shard.numel()]

    def step(self, lr: float) -> None:
        """Update the weights and clear the gradients."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.deepspeed.step()
        if self._copies is not None:
            self._copies.refresh()

    def discard(self) -> None:
        """Clear the gradients of a step, and DeepSpeed's counters since its last `step`."""
        self.deepspeed.zero_grad()
        if self.replicated:
            return
        optimizer = self.deepspeed.optimizer
        optimizer.zero_grad()  # at stage 3 the next gradient overwrites what the shards hold
        optimizer.averaged_gradients.clear()
        if self._offloaded:
            optimizer.reset_cpu_buffers()  # the norms computed while gradients were copied
        if self._stage < 3:
            optimizer.micro_step_id = -1  # the next backward is the first of a step again

    def owned_ranges(self) -> Sequence[OwnedRange]:
        """Return the ranges of the trainable parameters that this rank updates."""
        return self._ranges

    def optimizer_state(self, flat: Tensor) -> dict[str, Tensor]:
        """Return torch's record of one flat tensor; DeepSpeed wraps torch's optimizer."""
        optimizer = self.deepspeed.optimizer
        inner = optimizer if self.replicated else optimizer.optimizer
        record: dict[str, Tensor] = inner.state[flat]
        return record

    def weights_changed(self) -> None:
        """Copy the owned ranges to the weights of the forward pass, after a write to the ranges."""
        copy_to_forward(self.deepspeed, self._stage)
        if self._copies is not None:
            self._copies.refresh()

    def frozen_changed(self) -> None:
        """Let the forward pass see frozen weights that were written to."""
        if self._copies is not None:
            self._copies.refresh()

    def save(self, keep: Callable[[str, object], None]) -> None:
        """Give `keep` the name and content of each file of this rank; it must not raise."""
        self._files.keep = keep
        # NOTE: has barriers, so all ranks must get here. The folder and tag only name the files.
        self.deepspeed.save_checkpoint(".", tag="zero", save_latest=False)


def block_types(model: nn.Module) -> set[type[nn.Module]]:
    """Return the classes of the transformer blocks: modules in a list called `blocks`."""
    lists = (getattr(module, "blocks", None) for module in model.modules())
    return {type(block) for each in lists if isinstance(each, nn.ModuleList) for block in each}


class _Files(CheckpointEngine):  # type: ignore[misc] # DeepSpeed has no types
    """Takes the files that DeepSpeed would write, by their names without a folder."""

    def __init__(self) -> None:
        super().__init__()
        self.keep: Callable[[str, object], None]

    def create(self, info: object) -> None:
        """Do nothing: the files go to `keep` one by one."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: no file is written here."""

    def save(self, state_dict: object, path: str) -> None:
        """Hand one file over."""
        self.keep(Path(path).name, state_dict)

    def load(self, path: str, map_location: object = None) -> object:
        """Refuse: `zeta.zero.state` reads DeepSpeed's files."""
        raise RuntimeError(
            f"{path} is not loaded here: DeepSpeed was asked to load a checkpoint, which "
            "zeta.zero.state reads"
        )

    def commit(self, info: object) -> bool:
        """Do nothing: `zeta.checkpoint.store` publishes the files."""
        return True
