"""Predict the memory of training on each rank, by kind, before anything is allocated.

The memory has two parts. Weights, gradients, optimizer state and buffers depend on the sharding;
`state_memory` computes them from the sizes of the parameters. Activations depend on the model;
`activation_memory` counts them by running it, forward and backward, on tensors without content, and
adding up all live storages. This works for any model, dtype and sharding, needs no memory, and on
the CPU gives the bytes that a real run allocates.

Buffers are those of DeepSpeed 0.19.8: buckets of 5e8 elements for the reduction of gradients, which
are allocated in full even for a small model. `train.deepspeed` may set other sizes or host memory
for the optimizer's state.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zeta.models.layers import set_stream
from zeta.models.linear import Linear, WeightCopies
from zeta.models.packed_vit import PackedViT
from zeta.objectives.frozen import FrozenModule
from zeta.packed import PackedBatch
from zeta.train.config import TrainConfig
from zeta.zero.passthrough import offloads_optimizer

_FP32, _BF16 = 4, 2
_BUCKET = ("reduce_bucket_size", 500_000_000)
"""Elements of a bucket in which gradients are reduced: DeepSpeed's name and default."""
_PREFETCH = ("stage3_prefetch_bucket_size", 50_000_000)
"""Elements of weights gathered ahead at ZeRO-3."""
_KEPT_WHOLE = ("stage3_param_persistence_threshold", 100_000)
"""Largest parameters, in elements, that stay on every rank at ZeRO-3."""
_ATTENTION_WORKSPACE = 2 * 2**19 * _FP32
"""Scores and their gradient of one block, inside of the CPU's attention operator."""


@dataclass(frozen=True)
class StateMemory:
    """Bytes on one rank that do not depend on the images."""

    weights: int
    """fp32 weights, or this rank's shard of them."""
    copies: int
    """bf16 copies of the weights, to compute with (dtype bf16, ZeRO 0-2)."""
    master: int
    """Second copy of this rank's share of the weights, which the optimizer updates (ZeRO 1-3)."""
    gradients: int
    optimizer: int
    """State of the optimizer, fp32: the two moments of AdamW."""
    average: int
    """Moving average of the weights, if there is one."""
    buffers: int
    """Buckets for the reduction of gradients."""
    gathered: int
    """Weights of the layers at work, whole (ZeRO-3)."""
    beside: int = 0
    """Weights of a frozen module beside the model (a teacher), whole on every rank."""
    recorded: int = 0
    """Gradients of a pass that is recorded as a CUDA graph, and those handed over from it (at most:
    `auto` may decide against recording)."""
    on_host: int = 0
    """Part of all these in host memory (offload_optimizer)."""

    @property
    def total(self) -> int:
        """Bytes of all kinds together, except those in host memory."""
        with_host: int = sum(vars(self).values())
        return with_host - 2 * self.on_host  # it is part of the others, and in the sum itself

    @property
    def lasting(self) -> int:
        """Bytes that stay between two steps of ZeRO 0 to 2, without gradients and buckets."""
        return (
            self.weights + self.copies + self.master + self.optimizer + self.average + self.beside
        )


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes of one pack at a time, forward and backward."""

    saved: int
    """Tensors that the forward pass keeps for the backward pass."""
    peak: int
    """Largest number of live bytes at any time, without weights and gradients."""


def state_memory(
    sizes: Sequence[int],
    train: TrainConfig,
    world_size: int,
    frozen: Sequence[int] = (),
    moments: float = 2,
    beside: int = 0,
    *,
    recorded: bool = False,
) -> StateMemory:
    """Return the memory of one of `world_size` ranks besides activations.

    Args:
        sizes: elements of each parameter that learns.
        train: ZeRO stage, dtype, moving average, settings of DeepSpeed.
        world_size: W; shards are rounded up.
        frozen: elements of each parameter that does not learn (`train.trainable`), which has
            weights alone.
        moments: values that the optimizer keeps of a weight, in the mean: `state_per_weight`.
        beside: bytes of the weights of what runs beside the model, see `bytes_beside`.
        recorded: whether passes may be recorded as CUDA graphs, below ZeRO-3.
    """
    count, stage = sum(sizes), train.lowest_stage
    share = -(-count // world_size) if stage else count
    bucket, prefetch, kept_whole = (
        _elements(train.deepspeed, *setting) for setting in (_BUCKET, _PREFETCH, _KEPT_WHOLE)
    )
    everything = [*sizes, *frozen]
    kept = sum(size for size in everything if size <= kept_whole)
    bucket_bytes = _FP32
    if stage == 3 and train.dtype == "bf16":
        bucket_bytes = _FP32 + _BF16  # one bucket for either dtype
    gathered = 0
    if stage == 3:
        layer = max(everything, default=0)
        compute = _BF16 if train.dtype == "bf16" else _FP32
        gathered = min(sum(everything), layer + prefetch) * compute + kept * _FP32
    memory = StateMemory(
        weights=_FP32 * (-(-sum(everything) // world_size) if stage == 3 else sum(everything)),
        copies=_BF16 * sum(everything) if train.dtype == "bf16" and stage < 3 else 0,
        master=_FP32 * share if stage else 0,
        gradients=_FP32 * (share if stage >= 2 else count),
        optimizer=_FP32 * round(moments * share),
        average=_FP32 * share if train.ema_decay is not None else 0,
        buffers=bucket_bytes * (bucket if stage else min(count, bucket)),
        gathered=gathered,
        beside=beside,
        recorded=2 * _FP32 * count if recorded and stage < 3 else 0,
    )
    if stage == 0 or not offloads_optimizer(train.deepspeed):
        return memory
    gradients = memory.gradients if stage >= 2 else 0
    return replace(memory, on_host=memory.master + memory.optimizer + memory.average + gradients)


def bytes_beside(module: FrozenModule | None, dtype: str) -> int:
    """Return the bytes of the weights of a frozen module; with bf16 its matrices are in bf16."""
    if module is None:
        return 0
    everything = sum(parameter.numel() for parameter in module.parameters())
    linears = [layer for layer in module.modules() if isinstance(layer, Linear)]
    matrices = sum(parameter.numel() for layer in linears for parameter in layer.parameters())
    saved = (_FP32 - _BF16) * matrices if dtype == "bf16" else 0
    return _FP32 * everything - saved


def _elements(settings: Mapping[str, Any], name: str, default: int) -> int:
    """Return a size that `train.deepspeed` may set."""
    return int(settings.get("zero_optimization", {}).get(name, default))


def activation_memory(
    model: nn.Module,
    pack: PackedBatch,
    loss: Callable[[Any, PackedBatch], Tensor],
    dtype: str,
    beside: FrozenModule | None = None,
) -> ActivationMemory:
    """Count the activations of training on `pack`, with nothing allocated.

    Args:
        model: on the meta device; it is unusable afterwards.
        pack: on the CPU; its grids must fit the model.
        loss: the scalar loss of the model's outputs.
        dtype: bf16 or fp32.
        beside: what runs on the pack without a gradient once the model has run, like the model.
    """
    if beside is not None:
        beside.place(torch.device("meta"), torch.bfloat16 if dtype == "bf16" else None)
    both = nn.ModuleList([model] if beside is None else [model, beside])
    for module in both.modules():
        if isinstance(module, PackedViT):
            # Skip the check of the grids: it reads values, and these tensors have none.
            module.checks_grids = False
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialise(both)
        copies: list[Tensor] = []
        if dtype == "bf16":
            set_stream(model, torch.bfloat16)
            copies = WeightCopies(model, torch.bfloat16).copies
        fake = pack.to("cpu")
        with LiveBytes() as live:
            for tensor in (*both.parameters(), *copies):
                live.add(tensor)
            weights = live.now
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                total = loss(model(fake), fake)
                with torch.no_grad():
                    kept = None if beside is None else beside(fake)
            saved = live.now - weights
            torch.autograd.backward(total)
            del kept  # what is compared with lives until the backward pass
            gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return ActivationMemory(saved, max(saved, live.peak - weights - gradients))


def sum_of_outputs(outputs: Any, batch: PackedBatch) -> Tensor:
    """Return a scalar that depends on all outputs; its value does not matter for memory."""
    parts = vars(outputs) if is_dataclass(outputs) else outputs
    tensors = [leaf for leaf in tree_leaves(parts) if isinstance(leaf, Tensor)]
    return torch.stack([t.float().square().sum() for t in tensors if t.is_floating_point()]).sum()


def _materialise(model: nn.Module) -> None:
    """Give a model from the meta device parameters and buffers without content."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class LiveBytes(TorchDispatchMode):
    """A counter of the storages that operations return, each once and while it is alive."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.now = 0
        """Number of live bytes."""
        self.peak = 0
        """Largest number of live bytes so far."""
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        """Count the storage of `tensor`, unless it is counted."""
        storage = tensor.untyped_storage()
        if id(storage) in self._sizes:
            return
        self._sizes[id(storage)] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, id(storage))

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "zeta":
            self.peak = max(self.peak, self.now + _ATTENTION_WORKSPACE)
        return result
