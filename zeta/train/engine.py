"""The optimizer step at ZeRO 0 to 3: exact mean gradient, one NaN policy, one clip.

The sharded engine (`zeta.zero`) shards and communicates; the rules that decide the numbers are here
and the same at every stage.

- Mean: each pack's loss is ``local_sum * W / images of the step``; the engine averages over W
  ranks, so the gradient is the mean over all images of the step, however many each rank has.
- bf16: matrix products by autocast, on bf16 copies of the weights that are cast once a step, and a
  bf16 residual stream. The weights themselves, the sums of gradients, norms, softmax, losses and
  the position tables are fp32.
- Several packs go through one forward pass, as many as `train.tokens_per_forward` allows. A pack's
  random draws are its own, so this changes no result.
- After the last backward the loss and the squared norm of the gradients are summed over ranks in
  one collective. If a value is not finite on one rank, all ranks know it before any weight changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zeta.distributed import World, compiler_available
from zeta.exit_codes import RunError
from zeta.models.dropout import draws_at_random, image_seeds
from zeta.models.layers import (
    Attention,
    AttentionPool,
    ParallelBlock,
    set_checkpointing,
    set_stream,
)
from zeta.objectives import JointObjective, PackLoss, PackObjective
from zeta.objectives.base import DeclaredObjective, Step
from zeta.packed import PackedBatch, packs_per_rank
from zeta.random_state import seed_device
from zeta.train.attention_check import check_attention
from zeta.train.config import OptimConfig, TrainConfig
from zeta.train.device_clock import DeviceClock, Stopwatch
from zeta.train.execution import out_of_memory_message, packs_per_forward
from zeta.train.graphs.choice import choose_graphs
from zeta.train.graphs.recorded import CudaRecorder, RecordedPasses
from zeta.train.optim import build_optimizer, check_stage
from zeta.train.optimizers.table import highest_stage
from zeta.train.pack_feed import PackFeed, forward_groups
from zeta.zero.engine import ZeroEngine
from zeta.zero.protocol import ShardedEngine
from zeta.zero.weight_average import WeightAverage

_Group = tuple[list[PackedBatch], int]
"""The packs of a forward pass, and the seed of a model's own random draws."""
_Pass = tuple[Tensor, Callable[[], Mapping[str, Tensor]]]
"""The loss to go backward with, and what sums up the loss and the counts, to be called after it."""


@dataclass(frozen=True)
class StepResult:
    """The outcome of one optimizer step, the same on every rank."""

    loss_sum: float
    """Sum of the losses of all images of the step."""
    counts: Mapping[str, float]
    """The objective's named sums over all images of the step."""
    grad_norm: float
    """Norm of the mean gradient before clipping."""
    applied: bool
    """False if the loss or gradient was not finite on some rank: nothing was changed."""


class TrainEngine:
    """A model with its objective and optimizer, sharded over the ranks."""

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
            model: called with a PackedBatch, returns the outputs that `objective` needs; the same
                on every rank.
            objective: the loss.
            world: the ranks.
            train: stage, dtype, packs and compilation.
            optim: optimizer and clipping.

        Raises:
            ValueError: the model has no trainable parameter, or the config cannot work here.
            RunError: the installed DeepSpeed lacks something that zeta relies on.
        """
        self.world = world
        self.objective = objective
        check_stage(optim, train)
        self.clip = optim.clip
        self.forward_clock = Stopwatch(world.device)
        self.device_clock = DeviceClock(world.device)
        self.packs_per_rank = packs_per_rank(train.packs_per_step, world.size)
        self._train = train
        self._highest_stage = highest_stage(optim.kind)
        self._draws = draws_at_random(model)
        self._feed = PackFeed(world.device)
        model = model.to(world.device)
        set_checkpointing(model, train.activation_checkpointing)
        set_stream(model, torch.bfloat16 if train.dtype == "bf16" else None)
        choose_attention(model, train, world.device)
        objective.place(world.device, torch.bfloat16 if train.dtype == "bf16" else None)
        if should_compile(train.compile, world.device):
            compile_blocks(model)
        optimizer = build_optimizer(model, optim)
        self.sharded: ShardedEngine = ZeroEngine(model, optimizer, train.zero, world)
        """The model and its optimizer."""
        self.graphs = choose_graphs(train, model, objective, world.device)
        """Whether forward and backward passes are recorded."""
        self._recorded: RecordedPasses | None = None
        if self.graphs.use and isinstance(objective, PackObjective):
            required = train.cuda_graph == "true"
            recorder = CudaRecorder()
            self._recorded = RecordedPasses(self.sharded, objective, recorder, required=required)
        decay = train.ema_decay
        self.average = None if decay is None else WeightAverage(self.sharded, decay)
        """The moving average of the weights, if the run keeps one."""

    @property
    def module(self) -> nn.Module:
        """The model; its parameters may be sharded."""
        return self.sharded.module

    def train_step(
        self, packs: Sequence[PackedBatch], global_images: int, seeds: Sequence[int], lr: float
    ) -> StepResult:
        """Train on all packs of one optimizer step; every rank passes the same number of packs.

        Args:
            packs: this rank's packs, in host memory; empty ones have weight 0 and are run too.
            global_images: images of weight 1 in the packs of all ranks, at least 1.
            seeds: the random seed of each pack (dropout, stochastic depth).
            lr: learning rate of the step.

        Raises:
            RunError: out of memory on the device; the message names the settings that help.
        """
        assert len(packs) == self.packs_per_rank, (len(packs), self.packs_per_rank)
        try:
            with self.device_clock.step():
                return self._finish_step(self._gradients(packs, global_images, seeds), lr)
        except torch.OutOfMemoryError as error:
            raise RunError(
                out_of_memory_message(self._train, error, self._highest_stage)
            ) from error

    def _gradients(
        self, packs: Sequence[PackedBatch], global_images: int, seeds: Sequence[int]
    ) -> dict[str, Tensor]:
        """Run all packs forward and backward; return the sums of the loss and of the counts."""
        totals: dict[str, Tensor] = {}
        groups = self._joined(packs, seeds)
        factor = self.world.size / global_images
        passes = self._replayed if self._recorded is not None else self._launched
        for index, (mean, sums) in enumerate(passes(groups, factor)):
            self.sharded.backward(mean, last=index == len(groups) - 1)
            for name, value in sums().items():
                totals[name] = totals.get(name, 0.0) + value.detach().double()
        return totals

    def _launched(self, groups: Sequence[_Group], factor: float) -> Iterator[_Pass]:
        """Yield the loss of each forward pass, and its sums."""
        losses, kept = self._losses(groups)
        for loss, (batch, outputs) in zip(losses, kept or self._passes(groups), strict=True):
            with self.forward_clock.running():
                loss_sum = loss.loss_sum(outputs, batch)
            yield loss_sum * factor, partial(_sums, loss, loss_sum, outputs, batch)

    def _replayed(self, groups: Sequence[_Group], factor: float) -> Iterator[_Pass]:
        """Yield the same for each pass that was run forward and backward by replay.

        Nothing in it draws from torch's generators: models that might are not recorded.
        """
        assert self._recorded is not None
        for batch in self._feed.batches([packs for packs, _ in groups]):
            with self.forward_clock.running():
                mean, sums = self._recorded.run(batch, factor)
            yield mean, partial(dict, sums)

    def _joined(self, packs: Sequence[PackedBatch], seeds: Sequence[int]) -> list[_Group]:
        """Return the packs of each forward pass, and the seed of a model's own random draws."""
        most = packs_per_forward(self._train.tokens_per_forward, len(packs[0].patches))
        if self._draws:
            packs = with_seeds(packs, seeds)
        groups = forward_groups(len(packs), most)
        return [(list(packs[group.start : group.stop]), seeds[group.start]) for group in groups]

    def _passes(self, groups: Sequence[_Group]) -> Iterator[tuple[PackedBatch, Any]]:
        """Yield the joined batch and the model's outputs of each forward pass."""
        batches = self._feed.batches([packs for packs, _ in groups])
        for batch, (_, seed) in zip(batches, groups, strict=True):
            yield batch, self._forward(batch, seed)

    def _forward(self, batch: PackedBatch, seed: int) -> Any:
        """Return the model's outputs.

        Layers of zeta draw by `batch.draw_seeds`; those of a foreign model by torch's generator.
        """
        seed_device(seed, self.world.device)
        with self.forward_clock.running():
            return self.sharded.forward(batch)

    def _losses(
        self, groups: Sequence[_Group]
    ) -> tuple[list[PackLoss], list[tuple[PackedBatch, Any]]]:
        """Return the loss of each forward pass, and its batch and outputs if one pass is enough.

        With a joint objective all packs run forward here, so that each image is compared with the
        images of all packs. If one pass takes them all, it keeps its graph; otherwise they run
        forward a second time, with the memory of one pass (Gao et al. 2021, "GradCache").
        """
        if not isinstance(self.objective, JointObjective):
            return [self.objective] * len(groups), []
        single = len(groups) == 1
        with torch.set_grad_enabled(single):
            passes = list(self._passes(groups))
        batches, outputs = zip(*passes, strict=True)
        return list(self.objective.join(outputs, batches)), passes if single else []

    def follow_step(self, step: Step) -> None:
        """Let the objective follow a step that changed the weights."""
        self.objective.finish_step(self.module, step)
        if type(self.objective).finish_step is not DeclaredObjective.finish_step:
            self.sharded.frozen_changed()

    @contextmanager
    def evaluating(self, *, average: bool = False) -> Iterator[Callable[[PackedBatch], Any]]:
        """Yield the model for evaluation, as a function of a pack that returns its outputs.

        It computes without dropout or gradients, in the dtype of training. The state of training,
        including its random generators, is not changed. At ZeRO-3 a call is a collective.

        Args:
            average: compute with the moving average of the weights, which the run must keep.
        """
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        assert self.average is not None or not average, "train.ema_decay is not set"
        averaged = self.average.as_weights() if self.average and average else nullcontext()
        self.module.eval()
        try:
            with torch.random.fork_rng(devices), torch.no_grad(), averaged:
                yield self.sharded.forward
        finally:
            self.module.train()

    @contextmanager
    def embedding(
        self, encoder: Any, *, average: bool = False
    ) -> Iterator[Callable[[PackedBatch], Tensor]]:
        """Yield the encoder as a function of a pack that returns its pooled embeddings [I, dim].

        At ZeRO-3 a call is a collective.

        Args:
            encoder: the part of the model with `forward_embeddings`, or the model.
            average: as in `evaluating`.
        """
        with self.evaluating(average=average):
            yield partial(self.sharded.forward_as, encoder.forward_embeddings)

    @torch.no_grad()
    def _finish_step(self, totals: Mapping[str, Tensor], lr: float) -> StepResult:
        gradients = self.sharded.gradients()
        squared_norm = sum_of_squares(gradients, self.world.device)
        if self.sharded.replicated:  # every rank has the whole gradient
            squared_norm = squared_norm / self.world.size
        summed = torch.stack([squared_norm, *totals.values()])
        dist.all_reduce(summed)
        with self.device_clock.waiting():
            squared, *sums = summed.tolist()
        counts = dict(zip(totals, sums, strict=True))
        loss_sum = counts.pop("loss")
        finite = math.isfinite(squared) and math.isfinite(loss_sum)
        grad_norm = squared**0.5 if finite else float("nan")
        if finite:
            if self.clip > 0 and grad_norm > self.clip:
                torch._foreach_mul_(gradients, self.clip / (grad_norm + 1e-6))
            self.sharded.step(lr)
            if self.average is not None:
                self.average.update()
        else:
            self.sharded.discard()
        return StepResult(loss_sum, counts, grad_norm, applied=finite)


@torch.no_grad()
def _sums(loss: PackLoss, loss_sum: Tensor, outputs: Any, batch: PackedBatch) -> dict[str, Tensor]:
    return {"loss": loss_sum, **loss.counts(outputs, batch)}


def with_seeds(packs: Sequence[PackedBatch], seeds: Sequence[int]) -> list[PackedBatch]:
    """Return packs with the seed of each image's draws, from those of the packs."""
    seeds_PI = image_seeds(seeds, len(packs[0].weights))
    given = zip(packs, seeds_PI.unbind(), seeds_PI.tolist(), strict=True)
    return [
        replace(pack, draw_seeds=seeds_I, host_seeds=tuple(host)) for pack, seeds_I, host in given
    ]


def sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the float64 scalar sum of squares over all elements of `tensors`."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch.stack(torch._foreach_norm(list(tensors)))
    return norms.double().square().sum().to(device)


def should_compile(mode: str, device: torch.device) -> bool:
    """Return whether to compile: `auto` means on a CUDA device, if a compiler is found."""
    if mode == "auto":
        return device.type == "cuda" and compiler_available()
    return mode == "true"


def choose_attention(model: nn.Module, train: TrainConfig, device: torch.device) -> None:
    """Set the attention back-end of every layer of `model` to `train.attention`.

    Raises:
        ValueError: varlen was requested, but cannot run here.
    """
    kinds = (Attention, AttentionPool, ParallelBlock)
    for layer in (module for module in model.modules() if isinstance(module, kinds)):
        check_attention(train, device, layer.dim_head)
        layer.backend = train.attention


def compile_blocks(model: nn.Module) -> None:
    """Compile each block of `model.blocks` in place; parameter names do not change.

    It compiles block by block, so that all blocks of one shape share the compiled code.
    """
    for module in model.modules():
        for block in getattr(module, "blocks", ()):
            block.compile()
