"""`zeta train --dry-run`: all checks of a start, training on one pack, and a memory estimate."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from launch.config.load import ZetaConfig, to_yaml
from launch.run.checks import CheckedRun, check_start
from launch.run.execution import RunMemory, costliest_pack, run_memory
from launch.run.length import RunLength
from launch.run.pace import forecast, pace_rows, run_length
from launch.run.start_warnings import start_warnings
from launch.tables import plan_warnings
from zeta.distributed import RankInfo
from zeta.objectives import build_for_objective, build_objective
from zeta.objectives.base import Step
from zeta.packed import PackedBatch
from zeta.random_state import derive_seed
from zeta.train.config import TrainConfig
from zeta.train.hardware import RESERVE_GIB, Accelerator
from zeta.train.memory_model import ActivationMemory, StateMemory
from zeta.train.optimizers.table import highest_stage
from zeta.zero.passthrough import offloads_optimizer
from zeta.zero.start import close_distributed, init_distributed

_GIB = 2**30


def dry_run(config: ZetaConfig, world_size: int, gpu: Accelerator | None) -> int:
    """Check a run, train on one pack here, and print the steps and the memory of the run.

    Args:
        config: config of the run.
        world_size: number of ranks of the run.
        gpu: GPU of each rank; None: the memory is printed, but not compared with a GPU.

    Raises:
        ValueError, RunError: see `check_start`.
    """
    checked = check_start(config, world_size)
    _say(to_yaml(checked.config))
    length = run_length(checked, world_size)
    _say("\n".join(_steps(checked, length, world_size)))
    for subject, finding in pace_rows(forecast(checked, gpu), world_size, length.images_left):
        _say(f"{subject:<18}{finding}")
    pack = costliest_pack(checked)
    memory = run_memory(checked, pack)
    train = checked.config.train
    still = f", and {sum(memory.frozen):,} frozen" if memory.frozen else ""
    _say(f"\nparameters        {sum(memory.sizes):,}{still}")
    highest = highest_stage(checked.config.optim.kind)
    _say("\n".join(memory_table(memory, train, world_size, gpu, highest)))
    alone = memory.state_memory(replace(train, packs_per_step=1), 1)
    _say(f"\n{_try_pack(checked, pack, alone, memory.activations)}")
    return 0


def _say(text: str) -> None:
    """Print without buffering, even into a file: the next part may take minutes."""
    print(text, flush=True)


def _steps(checked: CheckedRun, length: RunLength, world_size: int) -> Iterator[str]:
    """Yield the lines about steps and tokens."""
    train, summary, per_step = checked.config.train, length.summary, length.tokens_per_step
    views = "" if summary.views == 1 else f", {summary.views} views of each"
    yield f"images            {summary.images:,}{views}"
    yield f"steps an epoch    {summary.steps_per_epoch:,}"
    packs = train.packs_per_step
    yield f"tokens a step     {per_step:,.0f} in {packs} packs, on {world_size} ranks"
    if (steps := length.steps) is not None:
        yield f"steps             {steps:,}"
        yield f"tokens            {steps * per_step:,.0f}"
    if train.max_images is not None:
        yield f"images at most    {train.max_images:,}"
    if train.max_tokens is not None:
        yield f"tokens at most    {train.max_tokens:,}"
    for warning in plan_warnings(summary, checked.plan, world_size):
        yield f"warning: {warning}"
    for warning in start_warnings(checked):
        yield f"warning: {warning}"


def memory_table(
    memory: RunMemory,
    train: TrainConfig,
    world_size: int,
    gpu: Accelerator | None,
    highest_stage: int = 3,
) -> list[str]:
    """Return the lines of the table of memory by kind and ZeRO stage, in GiB a rank."""
    whole = {k: v for k, v in train.deepspeed.items() if k != "zero_optimization"}
    settings = [replace(train, zero_stage=0, deepspeed=whole)]
    settings += [replace(train, zero_stage=stage) for stage in range(1, highest_stage + 1)]
    stages = [memory.state_memory(each, world_size) for each in settings]
    activations = memory.activations.peak
    names = [
        f"ZeRO {stage}{'*' if stage == train.lowest_stage else ''}"
        for stage in range(highest_stage + 1)
    ]
    lines = [f"{f'GiB a rank, W={world_size}':<18}" + "".join(f"{name:>10}" for name in names)]
    rows = [
        (field.name, [getattr(stage, field.name) for stage in stages])
        for field in dataclasses.fields(StateMemory)
        if memory.beside or field.name != "beside"
    ]
    if offloads_optimizer(train.deepspeed):
        rows[-1] = ("(on the host)", rows[-1][1])
    else:
        rows.pop()
    totals = [stage.total + activations for stage in stages]
    for name, values in [
        *rows,
        ("activations", [activations] * len(stages)),
        ("total", totals),
    ]:
        lines.append(f"{name:<18}" + "".join(f"{value / _GIB:>10.3f}" for value in values))
    if gpu is not None:
        fits = [gpu.fits(total) for total in totals]
        words = "".join(f"{'yes' if fit else 'NO':>10}" for fit in fits)
        lines.append(f"{f'fits {gpu.key}':<18}{words}")
        lines.append(
            f"({gpu.memory_gib:g} GiB a GPU, {RESERVE_GIB:g} of it for CUDA; activations are "
            "counted for the operators of a CPU)"
        )
    lines.append("(* train.zero_stage)")
    return lines


def _try_pack(
    checked: CheckedRun, pack: PackedBatch, states: StateMemory, activations: ActivationMemory
) -> str:
    """Train on `pack` on this machine, if it fits; return a line about the result."""
    train = replace(checked.config.train, packs_per_step=1)
    needed = states.lasting + states.gradients + activations.peak
    info = RankInfo()
    free = _free_memory(train.device)
    if needed > free:
        return (
            f"one pack was not tried: alone, this machine would need {needed / _GIB:.1f} GiB and "
            f"has {free / _GIB:.1f} GiB free"
        )
    world = init_distributed(info, device_kind=train.device)
    slow = "; that takes minutes for a large model" if world.device.type == "cpu" else ""
    _say(
        f"\nall checks have passed; training on one pack ({pack.num_images} images, "
        f"{pack.num_tokens} of {pack.patches.shape[0]} tokens) on {world.device}{slow}"
    )
    from zeta.train.engine import TrainEngine  # DeepSpeed, which wants the environment set
    from zeta.zero.build import build_for_training

    try:
        model = build_for_training(
            partial(_build, checked.config),
            train.zero,
            world,
            trainable=train.trainable,
            seed=train.seed,
        )
        num_classes = checked.config.model.resolve()["num_classes"]
        objective = build_objective(checked.config.objective, num_classes)
        objective.check(pack)
        objective.start(model)
        engine = TrainEngine(model, objective, world, train, checked.config.optim)
        first = Step(0, derive_seed(train.seed, 0), share=0.0)
        began = time.perf_counter()
        objective.begin_step(first)
        result = engine.train_step([pack], max(pack.num_images, 1), [0], lr=0.0)
        if result.applied:
            engine.follow_step(first)
        seconds = time.perf_counter() - began
    finally:
        close_distributed()
    loss = result.loss_sum / max(pack.num_images, 1)
    return f"forward, backward and update on {world.device}: loss {loss:.4f}, {seconds:.2f} s"


def _free_memory(device: str) -> int:
    """Return the free memory, in bytes, of the device of a single rank."""
    if device != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _build(config: ZetaConfig) -> nn.Module:
    return build_for_objective(config.model, config.objective, config.train.seed)
