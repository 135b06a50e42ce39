"""Jobs of test_lejepa: they run on every rank of a world and write what rank 0 saw."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from tests.zeta.engine_jobs import OPTIM, weights
from tests.zeta.training import BUDGET, lane_pack, shard_small_parameters, tiny_navit
from zeta.objectives import build_objective
from zeta.objectives.base import Step
from zeta.objectives.config import LejepaConfig, ObjectiveConfig
from zeta.objectives.view_model import ViewModel
from zeta.packed import lanes_of_rank
from zeta.train.config import TrainConfig
from zeta.train.engine import TrainEngine
from zeta.zero.start import init_distributed

shard_small_parameters()
CONFIG = ObjectiveConfig(kind="lejepa", lejepa=LejepaConfig(slices=8, dim=6, trade_off=0.2))


def views_pack(step, lane):
    """`lane_pack` whose rows are views of images, two by two; a lone last one has weight 0."""
    pack = lane_pack(step, lane)
    used = int((pack.weights > 0).sum())
    rows = torch.arange(len(pack.weights))
    view_of = torch.where(rows < used, rows - rows % 2, -1)
    even = rows < used - used % 2
    return replace(pack, view_of=view_of, weights=pack.weights * even)


def training(arguments):
    """Losses and weights after 3 steps, for each stage and number of packs in a forward pass."""
    world = init_distributed()
    total, report = arguments["packs_per_step"], {}
    for stage, packs in arguments["cases"]:
        train = TrainConfig(
            packs_per_step=total, zero_stage=stage, dtype="fp32", tokens_per_forward=packs * BUDGET
        )
        model = ViewModel(tiny_navit(num_classes=1), hidden=16, dim=6)
        objective = build_objective(CONFIG, 1)
        engine = TrainEngine(model, objective, world, train, OPTIM)
        losses = []
        for index in range(3):
            objective.begin_step(Step(index, seed=index, share=None))
            lanes = list(lanes_of_rank(world.rank, world.size, total))
            own = [views_pack(index, lane) for lane in lanes]
            images = sum(views_pack(index, lane).num_images for lane in range(total))
            result = engine.train_step(own, images, seeds=lanes, lr=1e-3)
            losses.append(result.loss_sum / images)
        flat = torch.cat([value.flatten() for value in weights(engine).values()])
        report[f"stage {stage}, {packs} packs"] = {"losses": losses, "weights": flat.tolist()}
    if world.is_main:
        Path(arguments["out"]).write_text(json.dumps(report))
