"""Four packs in one forward pass, as `train.tokens_per_forward: auto` joins them, or one by one.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.joining [--rounds 3] [--steps 5]

A step of four packs of 1,024 tokens, through the engine, in fp32: of the demo's model (64 channels)
and of wider ones. Both ways take turns; the ratio is of processor seconds, which other programs on
the machine change less than the time on the clock. `auto` says how many packs it joins.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from tests.benchmarks.gpu.common import photographs
from zeta.distributed import World
from zeta.models.config import ModelConfig, build_model
from zeta.objectives import build_objective
from zeta.objectives.config import ObjectiveConfig
from zeta.train.config import OptimConfig, TrainConfig
from zeta.train.execution import Need, Shape, choose_execution
from zeta.zero.start import close_distributed, init_distributed

TOKENS, PACKS = 1024, 4
SIZES = {"64 channels, 4 blocks": (64, 4, 4), "192 channels, 12 blocks": (192, 12, 3)}
SIZES |= {"384 channels, 12 blocks": (384, 12, 6)}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="the first so many")
    options = parser.parse_args(words)
    world = init_distributed(device_kind="cpu")
    try:
        for name in list(SIZES)[: options.sizes]:
            width, depth, heads = SIZES[name]
            shape = Shape(PACKS, TOKENS, width, joint=False)
            auto = choose_execution(settings("auto"), Need(lambda _: 0, 0), shape, 2**40).packs
            ways = {packs: step_of(width, depth, heads, packs, world) for packs in (1, PACKS)}
            ratios = compared(ways, options.rounds, options.steps)
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
            print(
                f"{name}: {PACKS} packs in one pass take {statistics.median(ratios):.3f} of the "
                f"time of one by one ({spread}); auto joins {auto}",
                flush=True,
            )
    finally:
        close_distributed()


def settings(tokens: int | str) -> TrainConfig:
    return TrainConfig(
        packs_per_step=PACKS, max_steps=10, dtype="fp32", zero_stage=0, tokens_per_forward=tokens
    )


def step_of(width: int, depth: int, heads: int, packs: int, world: World) -> Callable[[], object]:
    """A training step with so many packs in a forward pass."""
    from zeta.train.engine import TrainEngine  # DeepSpeed, which wants the environment set

    torch.manual_seed(0)
    model = build_model(
        ModelConfig(
            arch="navit",
            image_size=256,
            patch_size=16,
            num_classes=1000,
            dim=width,
            depth=depth,
            heads=heads,
            mlp_dim=4 * width,
        )
    )
    work = photographs(TOKENS)
    batch, images = [work.pack()] * PACKS, PACKS * len(work.images)
    engine = TrainEngine(
        model,
        build_objective(ObjectiveConfig(), 1000),
        world,
        settings(packs * TOKENS),
        OptimConfig(schedule="constant"),
    )
    return lambda: engine.train_step(batch, images, seeds=list(range(PACKS)), lr=1e-5)


def compared(ways: dict[int, Callable[[], object]], rounds: int, steps: int) -> list[float]:
    """Ratio of the joined way's processor seconds to the other's, of each round."""
    for step in ways.values():
        step()
    ratios = []
    for number in range(rounds):
        order = sorted(ways, reverse=bool(number % 2))  # neither way is always first
        seconds = {packs: processor_seconds(ways[packs], steps) for packs in order}
        ratios.append(seconds[PACKS] / seconds[1])
    return ratios


def processor_seconds(step: Callable[[], object], steps: int) -> float:
    began = time.process_time()
    for _ in range(steps):
        step()
    return time.process_time() - began


if __name__ == "__main__":
    main()
