"""Choose how a step is executed: the ZeRO stage, and how many packs go through a forward pass.

Neither changes a result. Both are chosen by the memory model (`zeta.train.memory_model`). Its
figures for a B/16 on an H200, with autocast and an fp32 residual stream as zeta had then, were 5.2
and 27.0 GiB where 5.3 and 27.4 GiB were measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zeta.config_field import AUTO
from zeta.train.config import TrainConfig

_GIB = 2**30
_FLAT = 65_536 * 768
"""Tokens times channels of a forward pass that keep a GPU at work: the most that was measured for a
B/16 on an H200 (MFU 0.34; 0.22 with a quarter of it). That other widths go in proportion is a
guess: the smaller a model is, the more tokens occupy the device."""
_SHARE = 0.85
"""Share of the memory that a choice of ours fills, where something fits there; the rest is for
fragmentation. Not measured."""
_REMEDIES = (
    "Set train.zero_stage to auto or higher (and start more ranks), train.tokens_per_forward to "
    "auto or lower, or train.activation_checkpointing=true; a smaller data.token_budget helps too"
)
_REMEDIES_WHOLE = (
    "Set train.tokens_per_forward to auto or lower, train.activation_checkpointing=true, or an "
    "optim.kind that can be sharded over more ranks, as adamw; a smaller data.token_budget helps "
    "too"
)
"""The remedies where the optimizer cannot be sharded."""
_FLAT_ON_CPU = 4_096 * 64
"""The same for one core of a CPU: with 64 channels and 4 blocks, a step of four packs of 1,024
tokens took half as long in one pass as in four; with 384 channels and 12 blocks 4 to 7% longer."""


@dataclass(frozen=True)
class Need:
    """The memory that one rank needs, in bytes, as the memory model predicts it."""

    states: Callable[[int], int]
    """Weights, gradients, optimizer and buffers at a ZeRO stage."""
    activations: int
    """Activations of one pack, forward and backward; 0: not known, as on a CPU."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a run that decide how much a forward pass should hold."""

    packs: int
    """Packs of a rank in a step."""
    token_budget: int
    """Tokens of a pack."""
    width: int
    """Channels of a token."""
    joint: bool
    """Whether the objective compares all images of a step: one pass then saves a second one."""


@dataclass(frozen=True)
class Execution:
    """How the steps of a run are executed."""

    stage: int
    """ZeRO stage."""
    packs: int
    """Packs in a forward pass, at most."""
    needed: int
    """Bytes of memory that this takes, as predicted."""


def choose_execution(
    train: TrainConfig, need: Need, shape: Shape, memory: int, highest_stage: int = 3
) -> Execution:
    """Return the lowest ZeRO stage that fits, and the packs that fit there.

    A stage fits if a quarter of the packs do that have use, since few packs leave the device idle;
    if there is none, it is the stage at which most packs fit. Choices fill a share of the memory.
    What fits into the whole of it alone is not refused: it runs with as few packs as the settings
    allow, at the stage that needs least.

    Args:
        train: the settings; those that are not auto are kept.
        need: the memory of a rank.
        shape: the sizes of the run.
        memory: bytes of the device.
        highest_stage: the highest that auto may choose, see `zeta.train.optimizers.table`.

    Raises:
        ValueError: what the settings ask for does not fit, or nothing does; with the figures.
    """
    chosen = train.tokens_per_forward == AUTO
    wanted = _wanted_packs(train, need, shape)
    least = 1 if chosen else wanted
    stages = (
        range(train.lowest_stage, highest_stage + 1)
        if train.zero_stage == AUTO
        else [train.lowest_stage]
    )
    best = Execution(stages[0], 0, 0)
    for stage in stages:
        states = need.states(stage)
        room = _SHARE * memory - states
        fitting = int(room // need.activations) if need.activations else wanted * (room >= 0)
        packs = min(wanted, fitting) if fitting >= least else 0
        if packs > best.packs:
            best = Execution(stage, packs, states + packs * need.activations)
        if 4 * packs >= wanted:
            return best
    if best.packs < 1:
        tight = [Execution(s, least, need.states(s) + least * need.activations) for s in stages]
        best = min(tight, key=lambda execution: execution.needed)
        if best.needed > memory:
            raise ValueError(memory_message(need, stages[-1], least, memory, highest_stage))
    return best


def _wanted_packs(train: TrainConfig, need: Need, shape: Shape) -> int:
    if train.tokens_per_forward != AUTO:
        return min(shape.packs, packs_per_forward(train.tokens_per_forward, shape.token_budget))
    if shape.joint and need.activations:
        return shape.packs
    flat = _FLAT if need.activations else _FLAT_ON_CPU
    return min(shape.packs, max(1, flat // shape.width // shape.token_budget))


def memory_message(need: Need, stage: int, packs: int, memory: int, highest_stage: int = 3) -> str:
    """Return why a run does not fit the memory of a rank, with the settings that help."""
    states, activations = need.states(stage), packs * need.activations
    return (
        f"the memory of a rank is {memory / _GIB:.1f} GiB, and at ZeRO stage {stage} it needs "
        f"{(states + activations) / _GIB:.1f}: {states / _GIB:.1f} for weights, gradients and "
        f"optimizer, {activations / _GIB:.1f} for the activations of {packs} "
        f"pack{'s' if packs > 1 else ''}. {_remedies(highest_stage)}"
    )


def out_of_memory_message(train: TrainConfig, error: Exception, highest_stage: int = 3) -> str:
    """Return what to do after a device has run out of memory.

    Args:
        train: the settings under which it did.
        error: what torch says about it, with the figures of the device.
        highest_stage: the highest at which the optimizer runs.
    """
    return (
        f"out of memory at train.zero_stage={train.lowest_stage}, train.tokens_per_forward="
        f"{train.tokens_per_forward}: {str(error).splitlines()[0]} The prediction is in the log "
        f"of rank 0 and in `zeta train CONFIG --dry-run`. {_remedies(highest_stage)}"
    )


def _remedies(highest_stage: int) -> str:
    return _REMEDIES if highest_stage else _REMEDIES_WHOLE


def packs_per_forward(tokens: Any, token_budget: int) -> int:
    """Return how many packs `train.tokens_per_forward` joins where nothing else was chosen.

    Args:
        tokens: the setting; auto, which `choose_execution` replaces, stands for one pack.
        token_budget: tokens of a pack.

    Raises:
        ValueError: a single pack has more tokens.
    """
    if tokens == AUTO:
        return 1
    if tokens < token_budget:
        raise ValueError(
            f"train.tokens_per_forward is {tokens}, less than one pack (data.token_budget = "
            f"{token_budget}): set it to a multiple of that, or to auto"
        )
    return int(tokens) // token_budget
