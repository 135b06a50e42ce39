"""Forward and backward passes that are recorded once, as a CUDA graph, and replayed for every pack.

Launching the kernels of a pass takes the host 60 ms for a B/16, whatever the pass holds; a recorded
pass is one launch. All shapes of a (joined) pack are constant, draws are hashes of the seeds that
it carries, and the lengths of its images are tensors: so a pass recorded on one pack computes any
other one of these shapes, once its tensors are copied to those that were recorded. What the host
must know ahead is the longest image: a recording serves packs up to the bound that it was made for,
and is made again for a higher one.

Only the computation is recorded: the model, its loss and their gradients, of leaves that share the
memory of the weights. The gradients are handed to the weights by a backward pass of one node, so
that the hooks of the sharded engine run as in any other pass, in the same order on every rank,
whether a rank replays or not.

On an H200 the shipped recipe trained by recorded passes; the test of a toy model, whose bound rises
after the first recording, failed there (docs/speed.md). Tests on a CPU, with a recorder that runs
the pass anew, find the bits of a plain pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.func import functional_call

from zeta.exit_codes import RunError
from zeta.models.attention.segments import bound_of
from zeta.models.packed_vit import PackedViT
from zeta.objectives import PackLoss
from zeta.packed import PackedBatch
from zeta.zero.protocol import ShardedEngine

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass:
    """What a pass computes; the next one overwrites it."""

    mean: Tensor
    """The loss to go backward with."""
    sums: Mapping[str, Tensor]
    """The sum of the losses, as `loss`, and the objective's counts."""
    gradients: Sequence[Tensor | None]
    """Gradient of `mean` for each parameter that learns; None: it has no part in it."""


class Recorder(Protocol):
    """Records what a function computes on tensors."""

    def record(self, run: Callable[[], Pass]) -> tuple[Pass, Callable[[], None]]:
        """Return the tensors that a replay fills, and the replay.

        Raises:
            RuntimeError: the function does something that cannot be recorded.
        """
        ...


class CudaRecorder:
    """Records CUDA graphs, which share their memory: only one is replayed at a time."""

    def __init__(self) -> None:
        self._alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def record(self, run: Callable[[], Pass]) -> tuple[Pass, Callable[[], None]]:
        """Record `run` as a CUDA graph, which computes nothing yet."""
        graph = torch.cuda.CUDAGraph()
        # The memory of graphs that are all gone cannot be joined: torch's allocator stops with
        # "use_count > 0 INTERNAL ASSERT FAILED" if some of it, as the workspace of cuBLAS, is used.
        pool = next((other.pool() for other in self._alive), None)
        # A capture that fails as it begins leaves its own stream the current one.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            # Other threads, which write a checkpoint or beat, may use the device meanwhile.
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            recorded = run()
        self._alive.add(graph)
        return recorded, graph.replay


class RecordedPasses:
    """Runs packs forward and backward by replay; where that fails, in the same order without."""

    def __init__(
        self,
        engine: ShardedEngine,
        objective: PackLoss,
        recorder: Recorder,
        *,
        required: bool = False,
    ) -> None:
        """Prepare to record; nothing is recorded yet.

        Args:
            engine: the model, whose weights stay where they are in memory.
            objective: the loss, which computes on the tensors of a pack alone.
            recorder: what records.
            required: fail if a pass cannot be recorded, rather than run it without.
        """
        self._engine, self._objective, self._required = engine, objective, required
        self._recorder: Recorder | None = recorder
        self._shapes: dict[tuple[object, ...], _Static] = {}
        for module in engine.module.modules():
            if isinstance(module, PackedViT):
                module.reads_lengths = False
        self._model = _Inner(engine.module)
        self._weights = [p for p in engine.module.parameters() if p.requires_grad]
        self._leaves: dict[str, Tensor] = {}
        self._addresses: list[int] = []

    def run(self, batch: PackedBatch, factor: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Compute a pack; return the scalar to go backward with, and the sums over its images.

        Args:
            batch: on the device.
            factor: on the sum of the losses, for the mean over all images of the step.

        Raises:
            RunError: recording is required, and failed.
        """
        sums: dict[str, Tensor] = {}

        def handed_over(batch: PackedBatch) -> Tensor:
            computed = self._compute(batch, factor)
            sums.update({name: value.detach() for name, value in computed.sums.items()})
            mean: Tensor = _HandOver.apply(computed.mean, computed.gradients, *self._weights)
            return mean

        # A tensor of its own: the engine tells its own backward pass by a hook on the loss, which
        # has to run before the hooks on what the model returns.
        mean = self._engine.forward_as(handed_over, batch) * 1
        return mean, sums

    def _compute(self, batch: PackedBatch, factor: float) -> Pass:
        addresses = [weight.data_ptr() for weight in self._engine.module.parameters()]
        if addresses != self._addresses:  # at first, and if the weights were put elsewhere
            self._addresses = addresses
            self._leaves = _leaves(self._engine.module)
            self._shapes.clear()
        tensors = batch.tensors().items()
        # An empty pack is one long tail: its bound and its attention would slow all others down.
        shapes = (batch.num_images > 0, *((n, t.shape, t.dtype) for n, t in tensors))
        static = self._shapes.get(shapes)
        if static is None:
            static = self._shapes[shapes] = _Static.like(batch)
        static.fill(batch, factor)
        if static.serves(batch) and self._recorder is not None and batch.num_images:
            if static.recorded is None:
                static.recorded = self._record(self._recorder, static)
            if static.recorded is not None:
                computed, replay = static.recorded
                replay()
                return computed
        # The first pass of a bound is not recorded: kernels are chosen and compiled in it.
        static.raise_bound(batch)
        return self._direct(static)

    def _record(
        self, recorder: Recorder, static: _Static
    ) -> tuple[Pass, Callable[[], None]] | None:
        try:
            return recorder.record(lambda: self._direct(static))
        except RuntimeError as error:  # out of memory too
            reason = str(error).splitlines()[0]
            if self._required:
                raise RunError(
                    f"train.cuda_graph is true, but the forward and backward pass cannot be "
                    f"recorded as a CUDA graph ({reason}): set train.cuda_graph to auto or false"
                ) from error
            _log.warning("passes run without CUDA graphs, as one cannot be recorded: %s", reason)
            self._recorder = None
            self._shapes.clear()
            return None

    def _direct(self, static: _Static) -> Pass:
        """Run the model, its loss and their backward pass on the tensors of `static`."""
        kind, pack = static.factor.device.type, static.pack
        autocast = torch.is_autocast_enabled(kind)
        # The cache of autocast would keep copies of weights from one recording to the next.
        with torch.autocast(kind, enabled=autocast, cache_enabled=False):
            outputs = functional_call(self._model, self._leaves, (pack,))
        with torch.autocast(kind, enabled=False):
            loss = self._objective.loss_sum(outputs, pack)
            mean = loss * static.factor
            learning = [leaf for leaf in self._leaves.values() if leaf.requires_grad]
            gradients = torch.autograd.grad(mean, learning, allow_unused=True)
            with torch.no_grad():
                counts = self._objective.counts(outputs, pack)
        return Pass(mean.detach(), {"loss": loss.detach(), **counts}, gradients)


@dataclass
class _Static:
    """Tensors of fixed addresses for packs of one shape, and what was recorded on them."""

    pack: PackedBatch
    """The last pack; its `lengths` are of the pack that set the bound."""
    factor: Tensor
    """Factor on the sum of the losses."""
    bound: int = 0
    """Longest segment that the recording serves; 0: none yet."""
    recorded: tuple[Pass, Callable[[], None]] | None = None

    @classmethod
    def like(cls, batch: PackedBatch) -> _Static:
        tensors: Any = {name: tensor.clone() for name, tensor in batch.tensors().items()}
        factor = torch.zeros((), device=batch.patches.device)
        return cls(replace(batch, **tensors, host_seeds=(), host_grids=(), keys=()), factor)

    def fill(self, batch: PackedBatch, factor: float) -> None:
        """Copy a pack to the fixed addresses."""
        given = batch.tensors()
        for name, tensor in self.pack.tensors().items():
            tensor.copy_(given[name])
        self.factor.fill_(factor)

    def serves(self, batch: PackedBatch) -> bool:
        """Return whether the bound of the longest segment holds for a pack."""
        return bound_of(batch.lengths) <= self.bound

    def raise_bound(self, batch: PackedBatch) -> None:
        """Let the bound hold for a pack; what was recorded for a lower one goes, and its memory."""
        if not self.serves(batch):
            self.bound, self.recorded = bound_of(batch.lengths), None
            self.pack = replace(self.pack, lengths=batch.lengths)


class _Inner(nn.Module):
    """Calls the forward pass of a model's class, while another stands in its place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pack: PackedBatch) -> Any:
        return type(self.model).forward(self.model, pack)


def _leaves(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters that share the memory of the model's, by their names in `_Inner`.

    They have no hooks, and autograd knows them from inside of the recording alone: it would let the
    stream on which it first saw a weight wait for the recording.
    """
    return {
        f"model.{name}": nn.Parameter(weight.detach(), weight.requires_grad)
        for name, weight in model.named_parameters()
    }


class _HandOver(torch.autograd.Function):
    """Hands gradients that are known to the parameters, in a backward pass like any other."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, gradients: Sequence[Tensor | None], *weights: Tensor
    ) -> Tensor:
        ctx.gradients = gradients
        return mean.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        known = [gradient for gradient in ctx.gradients if gradient is not None]
        # Copies: the next replay overwrites what was recorded, and these are added up.
        scaled = iter(torch._foreach_mul(known, grads[0]))
        own = [None if gradient is None else next(scaled) for gradient in ctx.gradients]
        return None, None, *own
