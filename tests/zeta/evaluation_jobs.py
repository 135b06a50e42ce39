"""Jobs of test_evaluation: they run on every rank of a world."""

import json
from dataclasses import replace
from pathlib import Path

from tests.zeta.training import (
    NUM_CLASSES,
    SyntheticSource,
    lane_pack,
    shard_small_parameters,
    tiny_navit,
)
from zeta.exit_codes import RunError
from zeta.objectives import build_objective
from zeta.objectives.config import ObjectiveConfig
from zeta.train.config import OptimConfig, TrainConfig
from zeta.train.engine import TrainEngine
from zeta.train.evaluation import evaluate
from zeta.zero.start import close_distributed, init_distributed

shard_small_parameters()


def _engine(world, lanes, stage, dtype="fp32"):
    train = TrainConfig(packs_per_step=lanes, zero_stage=stage, dtype=dtype)
    objective = build_objective(ObjectiveConfig(label_smoothing=0.1), NUM_CLASSES)
    return TrainEngine(tiny_navit(dropout=0.5), objective, world, train, OptimConfig())


class OneLane(SyntheticSource):
    """All images are in lane 0: every other rank has none."""

    def _packs(self, step):
        made = super()._packs(step)
        if self.rank == 0:
            return made
        empty = tuple(lane_pack(step, 0, images=0) for _ in made.packs)
        return replace(made, packs=empty, more=False)


def scores(arguments):
    """Evaluate at every stage and write what the last rank found."""
    world = init_distributed()
    lanes, steps = arguments["lanes"], arguments["steps"]

    def run(engine, source):
        with engine.evaluating() as predict:
            found = evaluate(predict, engine.objective, source, world)
        assert engine.module.training
        return {"images": found.images, **found.scores}

    report = {}
    for stage in range(4):
        source = SyntheticSource(world.rank, world.size, lanes, epoch_steps=steps)
        report[f"stage {stage}"] = run(_engine(world, lanes, stage), source)
    source = SyntheticSource(world.rank, world.size, lanes, epoch_steps=steps)
    report["bf16"] = run(_engine(world, lanes, 2, "bf16"), source)
    one = OneLane(world.rank, world.size, world.size, epoch_steps=steps)
    images = sum(lane_pack(step, 0).num_images for step in range(steps))
    report["one lane has all"] = run(_engine(world, lanes, 3), one) | {"lane images": images}
    if world.rank == world.size - 1:
        Path(arguments["out"]).write_text(json.dumps(report))
    close_distributed()


def failure(arguments):
    """Rank 1 fails to read its second step; every rank says how it ended."""
    world = init_distributed()
    source = SyntheticSource(world.rank, world.size, 6, epoch_steps=4)
    original = source._packs

    def packs(step):
        if world.rank == 1 and step == 1:
            raise {"OSError": OSError, "RunError": RunError}[arguments["error"]]("no such shard")
        return original(step)

    source._packs = packs
    engine = _engine(world, 6, 3)
    try:
        with engine.evaluating() as predict:
            evaluate(predict, engine.objective, source, world)
    except (OSError, RunError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        close_distributed()
        return 0
    return 1
