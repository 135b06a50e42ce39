"""Decide whether the passes of a run are recorded as CUDA graphs (`train.cuda_graph`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zeta.config_field import AUTO
from zeta.models.attention import launches_are_fixed
from zeta.models.layers import Attention, AttentionPool, ParallelBlock
from zeta.models.packed_vit import PackedViT
from zeta.objectives import PackObjective
from zeta.objectives.base import DeclaredObjective
from zeta.train.config import TrainConfig

_HOST_BINDS = 6e12
"""Operations of a block in a pass below which the host may bind. Measured on an H200, forward and
backward, launched against recorded: 61 against 8 ms for a B/16 with 4,096 tokens (0.2e12), 78
against 29 with 16,384 (0.7e12), 174 against 156 for an L/16 with 32,768 (2.5e12), 62 against 61 for
a training step of a B/16 with 45,000 (1.9e12). All were on an idle host. Beside 14 workers of the
loader on 16 cores, launching a B/16 with 65,536 tokens (2.8e12) took 94 ms, as long as the device.
That the host may still bind at twice as many operations is a guess."""


@dataclass(frozen=True)
class GraphChoice:
    """Whether passes are recorded."""

    use: bool
    reason: str = ""
    """Why they are not."""


def choose_graphs(
    train: TrainConfig, model: nn.Module, objective: Any, device: torch.device
) -> GraphChoice:
    """Return whether to record the passes of a run.

    `auto` does so where it is known to pay, and leaves an objective from elsewhere alone: that one
    might compute with numbers of the host, which a recording would keep.

    Args:
        train: settings with nothing left to choose.
        model: the model, on any device.
        objective: the loss.
        device: device of the run.

    Raises:
        ValueError: `train.cuda_graph` is true, and they cannot be recorded.
    """
    if train.cuda_graph == "false":
        return GraphChoice(False, "train.cuda_graph is false")
    obstacle = graph_obstacle(train, model, objective, device)
    if train.cuda_graph == "true":
        if obstacle is not None:
            raise ValueError(
                f"train.cuda_graph is true, but passes cannot be recorded here: {obstacle}; set "
                "train.cuda_graph to auto or false"
            )
        return GraphChoice(True)
    if obstacle is None and not type(objective).__module__.startswith("zeta."):
        obstacle = f"{type(objective).__name__} is not an objective of zeta"
    if obstacle is None and (operations := block_operations(train, model)) > _HOST_BINDS:
        obstacle = (
            f"a pass keeps the device busy without: {operations / 1e12:.1f} TFLOP a block, and "
            f"above {_HOST_BINDS / 1e12:.1f} the device binds"
        )
    return GraphChoice(True) if obstacle is None else GraphChoice(False, obstacle)


def graph_obstacle(
    train: TrainConfig, model: nn.Module, objective: Any, device: torch.device
) -> str | None:
    """Return why the passes of a run cannot be recorded; None: they can."""
    if device.type != "cuda":
        return f"the device is a {device.type}, and graphs are CUDA's"
    if train.lowest_stage == 3:
        return "at ZeRO stage 3 weights are gathered between the kernels (train.zero_stage)"
    if not isinstance(objective, PackObjective):
        return f"{type(objective).__name__} compares the images of all passes (objective.kind)"
    if getattr(objective, "whole_images", False):
        return f"{type(objective).__name__} gets another number of dropped patches with each pack"
    if getattr(type(objective), "begin_step", None) is not DeclaredObjective.begin_step:
        return f"{type(objective).__name__} prepares numbers for each step (begin_step)"
    if not isinstance(model, PackedViT):
        return f"{type(model).__name__} is not an image encoder of zeta (model.arch)"
    if model.prefix_tokens:
        return "the host finds the rows of class tokens and registers (model.pool, model.registers)"
    dtype = torch.bfloat16 if train.dtype == "bf16" else torch.float32
    kinds = (Attention, AttentionPool, ParallelBlock)
    widths = {module.dim_head for module in model.modules() if isinstance(module, kinds)}
    if not all(launches_are_fixed(train.attention, device, dtype, width) for width in widths):
        return (
            f"the launches of train.attention={train.attention} at train.dtype={train.dtype} "
            "depend on the lengths of the images"
        )
    return None


def block_operations(train: TrainConfig, model: nn.Module) -> float:
    """Return the operations of the products with the weights of a block in one pass; 0: unknown."""
    blocks: Sequence[nn.Module] = getattr(model, "blocks", ())
    if train.tokens_per_forward == AUTO or not len(blocks):
        return 0.0
    weights: int = sum(p.numel() for block in blocks for p in block.parameters())
    return 6.0 * weights / len(blocks) * int(train.tokens_per_forward)
