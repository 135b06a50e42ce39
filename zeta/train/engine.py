"""The optimizer step on DeepSpeed ZeRO 0-3: exact mean gradient, one NaN policy, one clip.

DeepSpeed shards and communicates; what decides the numbers is here and the same on every stage.

- Mean: each pack's loss is ``local_sum * W / images of the step``; DeepSpeed averages over W
  ranks, so the gradient is the mean over all images of the step, whatever each rank holds.
- bf16 is autocast over fp32 weights: matrix products in bf16; weights, gradients and their
  accumulation in fp32, with no second copy of the weights to round or to keep in step.
- After the last backward the loss and the squared norm of the gradients are summed over ranks in
  one collective. A value that is not finite on any rank is so on all, before any weight changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from zeta.distributed import World, compiler_available
from zeta.models.attention import varlen_obstacle
from zeta.models.layers import Attention, AttentionPool, ParallelBlock
from zeta.models.packed_vit import PackedViT
from zeta.models.text_tower import TextTower
from zeta.objectives import JointObjective, PackLoss, PackObjective
from zeta.packed import PackedBatch
from zeta.random_state import seed_device
from zeta.train.config import OptimConfig, TrainConfig
from zeta.train.optim import build_optimizer
from zeta.train.straggler import ForwardClock
from zeta.zero.config import deepspeed_config
from zeta.zero.layout import flat_weights
from zeta.zero.passthrough import offloads_optimizer
from zeta.zero.weight_average import WeightAverage


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on every rank."""

    loss_sum: float
    """Sum of the losses of all images of the step."""
    counts: Mapping[str, float]
    """The objective's named sums over all images of the step."""
    grad_norm: float
    """Norm of the mean gradient before clipping."""
    applied: bool
    """False if the loss or gradient was not finite on some rank: nothing was changed."""


class TrainEngine:
    """A model, its objective and optimizer on DeepSpeed."""

    def __init__(
        self,
        model: nn.Module,
        objective: PackObjective | JointObjective,
        world: World,
        train: TrainConfig,
        optim: OptimConfig,
    ) -> None:
        """Place `model` on the device and shard it over the ranks.

        Args:
            model: called with a PackedBatch, returns the outputs that `objective` takes. Every
                rank passes the same.
            objective: the loss.
            world: the ranks.
            train: stage, dtype, packs and compilation.
            optim: optimizer and clipping.
        """
        self.world = world
        self.objective = objective
        self.clip = optim.clip
        self.stage = train.zero_stage
        self.offloaded = offloads_optimizer(train.deepspeed)
        self.forward_clock = ForwardClock(world.device)
        self.packs_per_rank = -(-train.packs_per_step // world.size)
        model = model.to(world.device)
        for module in model.modules():
            if isinstance(module, PackedViT | TextTower):
                module.activation_checkpointing = train.activation_checkpointing
        choose_attention(model, train, world.device)
        if should_compile(train.compile, world.device):
            compile_blocks(model)
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, optim, train.deepspeed.get("optimizer")),
            config=deepspeed_config(train.zero, world.size),
        )
        decay = train.ema_decay
        self.average = None if decay is None else WeightAverage(self.deepspeed, self.stage, decay)
        """The moving average of the weights, if the run keeps one."""

    @property
    def module(self) -> nn.Module:
        """The model, without DeepSpeed's wrapper; its parameters may be sharded."""
        module: nn.Module = self.deepspeed.module
        return module

    def train_step(
        self, packs: Sequence[PackedBatch], global_images: int, seeds: Sequence[int], lr: float
    ) -> StepResult:
        """Train on all packs of one optimizer step; every rank calls this with as many packs.

        Args:
            packs: this rank's packs, on any device; empty ones have weight 0 and are run too.
            global_images: images of weight 1 in the packs of all ranks, at least 1.
            seeds: the random seed of each pack's forward (dropout).
            lr: learning rate of the step.
        """
        assert len(packs) == self.packs_per_rank, (len(packs), self.packs_per_rank)
        totals: dict[str, Tensor] = {}
        losses, kept = self._pack_losses(packs, seeds)
        for index, (pack, seed) in enumerate(zip(packs, seeds, strict=True)):
            self.deepspeed.set_gradient_accumulation_boundary(index == len(packs) - 1)
            batch = pack.to(self.world.device)
            outputs = kept[index] if kept else self._forward(batch, seed)
            with self.forward_clock.running():
                loss_sum = losses[index].loss_sum(outputs, batch)
            self.deepspeed.backward(
                loss_sum * (self.world.size / global_images), scale_wrt_gas=False
            )
            with torch.no_grad():
                sums = {"loss": loss_sum, **losses[index].counts(outputs, batch)}
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value.detach().double()
        return self._finish_step(totals, lr)

    def _forward(self, batch: PackedBatch, seed: int) -> Any:
        """Return the model's outputs; the same seed drops the same."""
        seed_device(seed, self.world.device)
        with self.forward_clock.running():
            return self.deepspeed(batch)

    def _pack_losses(
        self, packs: Sequence[PackedBatch], seeds: Sequence[int]
    ) -> tuple[list[PackLoss], list[Any]]:
        """Return the loss of each pack, and their outputs if they need not be computed again.

        Of a joint objective all packs run forward here, so that the images of a step see each
        other whatever pack they are in. Only a single pack keeps its graph; several run forward
        once more, at the memory of one (Gao et al. 2021, "GradCache").
        """
        if not isinstance(self.objective, JointObjective):
            return [self.objective] * len(packs), []
        batches = [pack.to(self.world.device) for pack in packs]
        with torch.set_grad_enabled(len(packs) == 1):
            outputs = [self._forward(*each) for each in zip(batches, seeds, strict=True)]
        losses = list(self.objective.join(outputs, batches))
        return losses, outputs if len(packs) == 1 else []

    @contextmanager
    def evaluating(self, *, average: bool = False) -> Iterator[Callable[[PackedBatch], Any]]:
        """Give the model as a function from a pack on the device to its outputs, to evaluate.

        Without dropout or gradients, in the dtype of training. Nothing that training goes on with
        is changed, the state of random generators included. At ZeRO-3 a call is a collective.

        Args:
            average: with the moving average of the weights, which the run must keep.
        """
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        assert self.average is not None or not average, "train.ema_decay is not set"
        averaged = self.average.as_weights() if self.average and average else nullcontext()
        self.deepspeed.eval()
        try:
            with torch.random.fork_rng(devices), torch.no_grad(), averaged:
                yield self.deepspeed
        finally:
            self.deepspeed.train()

    @torch.no_grad()
    def _finish_step(self, totals: Mapping[str, Tensor], lr: float) -> StepResult:
        gradients = self._local_gradients()
        squared_norm = sum_of_squares(gradients, self.world.device)
        if self.stage == 0:  # every rank holds the whole gradient
            squared_norm = squared_norm / self.world.size
        summed = torch.stack([squared_norm, *totals.values()])
        dist.all_reduce(summed)
        squared, *sums = summed.tolist()
        counts = dict(zip(totals, sums, strict=True))
        loss_sum = counts.pop("loss")
        finite = bool(torch.isfinite(summed[:2]).all())
        grad_norm = squared**0.5 if finite else float("nan")
        if finite:
            if self.clip > 0 and grad_norm > self.clip:
                torch._foreach_mul_(gradients, self.clip / (grad_norm + 1e-6))
            for group in self.deepspeed.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            self.deepspeed.step()
            if self.average is not None:
                self.average.update()
        else:
            self._discard(gradients)
        return StepResult(loss_sum, counts, grad_norm, applied=finite)

    def _local_gradients(self) -> list[Tensor]:
        """This rank's share of the reduced gradient: shards of it, or all of it at stage 0."""
        if self.stage == 0:
            return [p.grad for p in self.module.parameters() if p.grad is not None]
        if self.offloaded:  # in host memory, beside the weights that the optimizer updates
            if self.world.device.type == "cuda":
                torch.cuda.synchronize(self.world.device)  # the copies to there may be under way
            flats = flat_weights(self.deepspeed, self.stage)
            return [flat.grad for flat in flats if flat.grad is not None]
        shards = self.deepspeed.optimizer.averaged_gradients.values()
        return [shard for group in shards for shard in group if shard.numel()]

    def _discard(self, gradients: list[Tensor]) -> None:
        """Drop the gradients of this step; weights and optimizer state stay as they are."""
        if self.stage == 0:
            self.deepspeed.zero_grad()
            return
        # DeepSpeed's own overflow path knows every buffer to reset; it is taken if the norm of
        # the gradient is NaN. Only rank 0's first element is written: it is always real data,
        # which the next backward overwrites, where the padding of a shard would stay NaN.
        if self.world.is_main and self.offloaded:
            norms = self.deepspeed.optimizer.norm_for_param_grads  # taken when they were copied
            norms[next(iter(norms))] = torch.tensor(float("nan"))
        elif self.world.is_main:
            gradients[0].view(-1)[0] = float("nan")
        self.deepspeed.step()
        if self.deepspeed.was_step_applied():
            raise AssertionError("DeepSpeed applied a step whose gradient is NaN")


def sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the float64 scalar sum of squares over all elements of `tensors`."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch.stack(torch._foreach_norm(list(tensors)))
    return norms.double().square().sum().to(device)


def should_compile(mode: str, device: torch.device) -> bool:
    """Whether to compile: `auto` means on a CUDA device, where a compiler is found."""
    if mode == "auto":
        return device.type == "cuda" and compiler_available()
    return mode == "true"


def choose_attention(model: nn.Module, train: TrainConfig, device: torch.device) -> None:
    """Let `model` attend by `train.attention`.

    Raises:
        ValueError: varlen was asked for where it cannot run.
    """
    dtype = torch.bfloat16 if train.dtype == "bf16" else torch.float32
    kinds = (Attention, AttentionPool, ParallelBlock)
    for layer in (module for module in model.modules() if isinstance(module, kinds)):
        obstacle = varlen_obstacle(device, dtype, layer.dim_head)
        if train.attention == "varlen" and obstacle is not None:
            raise ValueError(
                f"train.attention is varlen, which cannot run here: {obstacle}; set "
                "train.attention=auto"
            )
        layer.backend = train.attention


def compile_blocks(model: nn.Module) -> None:
    """Compile each block of `model.blocks` in place; parameter names do not change.

    Block by block, so that the code is compiled once for all blocks of one shape.
    """
    for module in model.modules():
        for block in getattr(module, "blocks", ()):
            block.compile()
