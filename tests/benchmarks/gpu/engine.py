"""The training engine at ZeRO 0 to 3 on fixed packs, its peak memory against the dry run's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from tests.benchmarks.gpu.common import (
    Options,
    Row,
    build,
    config,
    guarded,
    photographs,
    rates,
    timed,
)
from zeta.models.config import build_model
from zeta.objectives import build_objective
from zeta.objectives.config import ObjectiveConfig
from zeta.train.config import OptimConfig, TrainConfig
from zeta.train.memory_model import activation_memory, state_memory
from zeta.zero.start import close_distributed, init_distributed

CASES = (
    ("navit_l16", 32768, 2),
    ("navit_l16", 32768, 3),
    ("navit_b16", 65536, 2),
    ("navit_b16", 4096, 2),
    ("navit_b16", 65536, 0),
    ("navit_b16", 65536, 1),
    ("navit_b16", 65536, 3),
)
"""By importance."""


def rows(options: Options) -> Iterator[Row]:
    cases = [("navit_l16", 128, stage) for stage in range(4)] if options.toy else CASES
    try:
        yield from guarded(
            (f"{name} ZeRO {stage}, {tokens:,}", partial(case, name, tokens, stage, options))
            for name, tokens, stage in cases
        )
    finally:
        close_distributed()


def case(preset: str, tokens: int, stage: int, options: Options) -> Row:
    from zeta.train.engine import TrainEngine  # DeepSpeed, which wants the environment set

    world = init_distributed(device_kind=options.device)
    train = TrainConfig(packs_per_step=1, max_steps=100, dtype="bf16", zero_stage=stage)
    work, model = photographs(options.tokens(tokens)), build(preset, options)
    pack = work.pack()
    flops = model.training_flops(pack)
    sizes = [parameter.numel() for parameter in model.parameters()]
    objective = build_objective(ObjectiveConfig(), 1000)
    engine = TrainEngine(model, objective, world, train, OptimConfig(schedule="constant"))
    pack = pack.pin_memory() if options.cuda else pack
    count = len(work.images)
    row = timed(lambda: engine.train_step([pack], count, seeds=[1], lr=1e-5), options, 6)
    with torch.device("meta"):
        empty = build_model(config(preset, options))
    activations = activation_memory(
        empty, work.pack(), lambda out, _: out.float().square().sum(), train.dtype
    )
    planned = state_memory(sizes, train, 1, recorded=engine.graphs.use).total + activations.peak
    return rates(row | {"dry_run_gib": planned / 2**30}, count, flops, options)
