"""Jobs of test_memory_model: what lies in memory between two steps."""

import gc
import json
from functools import partial
from pathlib import Path

import torch

from tests.zeta.packs import make_pack
from zeta import NaViT
from zeta.models.parameters import full_shape
from zeta.objectives import build_objective
from zeta.objectives.config import ObjectiveConfig
from zeta.train.config import OptimConfig, TrainConfig
from zeta.train.engine import TrainEngine
from zeta.train.memory_model import state_memory
from zeta.train.optim import state_per_weight
from zeta.train.optimizers.table import highest_stage
from zeta.zero.build import build_for_training
from zeta.zero.start import close_distributed, init_distributed


def _held():
    """Bytes of all tensors of this process, each storage once."""
    tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def held_by_stage(arguments):
    """Predicted and measured bytes after two steps, at every stage: [predicted, measured]."""
    world = init_distributed()
    objective = build_objective(ObjectiveConfig(), 10)
    report = {}
    engines = []  # none is freed: what is measured is what each one adds
    optim = OptimConfig(kind=arguments["kind"], schedule="constant")
    for stage in range(highest_stage(optim.kind) + 1):
        gc.collect()
        before = _held()
        train = TrainConfig(
            packs_per_step=4, zero_stage=stage, dtype=arguments["dtype"], max_steps=3
        )
        train.ema_decay = 0.99
        build = partial(NaViT, 64, 16, 10, 192, 4, 3, 768)
        model = build_for_training(
            build, train.zero, world, trainable=train.trainable, seed=train.seed
        )
        engine = TrainEngine(model, objective, world, train, optim)
        engines.append(engine)
        packs = [make_pack([torch.zeros(3, 32, 32, dtype=torch.uint8)], 16, 4, 1)] * 2
        for _ in range(2):
            engine.train_step(packs, 4, [0, 0], 1e-3)
        gc.collect()
        sizes = [torch.Size(full_shape(p)).numel() for p in engine.module.parameters()]
        moments = state_per_weight(optim, NaViT(64, 16, 10, 192, 4, 3, 768))
        memory = state_memory(sizes, train, world.size, moments=moments)
        predicted = memory.lasting
        if stage == 3:  # buckets and the flat gradient are made once and kept
            predicted += memory.gradients + memory.buffers
        report[stage] = [predicted, _held() - before]
    if world.is_main:
        Path(arguments["out"]).write_text(json.dumps(report))
    close_distributed()
