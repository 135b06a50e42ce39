"""Jobs of test_joining: they run on every rank of a world and write what rank 0 saw."""

import json
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.zeta import image_text_jobs
from tests.zeta.engine_jobs import OPTIM, objective, step, weights
from tests.zeta.training import BUDGET, shard_small_parameters, tiny_navit
from zeta.train.config import TrainConfig
from zeta.train.engine import TrainEngine
from zeta.zero.start import init_distributed

shard_small_parameters()
DRAWS = {"dropout": 0.2, "emb_dropout": 0.1, "stochastic_depth": 0.3}


def engine_of(world, packs_per_step, stage, packs, deepspeed=None, **changes):
    train = TrainConfig(
        deepspeed=deepspeed or {},
        packs_per_step=packs_per_step,
        zero_stage=stage,
        dtype="fp32",
        tokens_per_forward=packs * BUDGET,
    )
    return TrainEngine(tiny_navit(**changes), objective(), world, train, OPTIM)


def joining(arguments):
    """Losses and weights after 3 steps, for each number of packs in a forward pass and stage."""
    world = init_distributed()
    report = {}
    for stage in range(4):
        for packs in arguments["packs"]:
            engine = engine_of(world, arguments["packs_per_step"], stage, packs, **DRAWS)
            steps = [step(engine, world, i, arguments["packs_per_step"]) for i in range(3)]
            flat = torch.cat([value.flatten() for value in weights(engine).values()])
            report[f"stage {stage}, {packs} packs"] = {
                "losses": [result.loss_sum / images for result, images in steps],
                "norms": [result.grad_norm for result, _ in steps],
                "weights": flat.tolist(),
            }
    if world.is_main:
        Path(arguments["out"]).write_text(json.dumps(report))


def joint(arguments):
    """The same for an objective that compares all images of a step, and its forward passes."""
    world = init_distributed()
    report = {}
    for kind in ("siglip", "clip"):
        for packs in arguments["packs"]:
            engine = image_text_jobs.build(world, kind, 3 * world.size, 0, dropout=0.2, packs=packs)
            forwards = []
            inner = engine.sharded.forward
            engine.sharded.forward = lambda batch, f=forwards, g=inner: (f.append(1), g(batch))[1]
            result, _ = image_text_jobs.step(engine, world, 0, 3 * world.size)
            flat = torch.cat([v.flatten() for v in image_text_jobs.weights(engine).values()])
            report[f"{kind}, {packs} packs"] = {
                "forwards": len(forwards),
                "loss": result.loss_sum,
                "weights": flat.tolist(),
            }
    if world.is_main:
        Path(arguments["out"]).write_text(json.dumps(report))


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("c10d::") and "barrier" not in name:
            self.counts["collectives"] += 1
            self.counts[name] += 1
        if name in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"):
            self.counts["reads of the device"] += 1
        return func(*args, **(kwargs or {}))


def counts(arguments):
    """Collectives, reads and gradient hooks of one step, by stage, forward passes and blocks."""
    world = init_distributed()
    report = {}
    for stage in range(4):
        for depth, packs in ((2, 4), (2, 2), (4, 4)):
            engine = engine_of(world, 4 * world.size, stage, packs, depth=depth)
            step(engine, world, 0, 4 * world.size)  # the first allocates and broadcasts
            step(engine, world, 1, 4 * world.size)
            hooks = Counter()
            _count_reductions(engine.sharded.deepspeed.optimizer, hooks)
            seen = _Operations()
            inner = engine.train_step

            def watched(*args, _inner=inner, _seen=seen, **options):
                with _seen:
                    return _inner(*args, **options)

            engine.train_step = watched
            step(engine, world, 2, 4 * world.size)
            report[f"stage {stage}, depth {depth}, {4 // packs} forwards"] = seen.counts | hooks
    if world.is_main:
        Path(arguments["out"]).write_text(json.dumps(report))


def gathers(arguments):
    """Gathers of weights in one step at ZeRO-3 without prefetching, by the number of blocks."""
    world = init_distributed()
    report = {}
    nothing_ahead = {"zero_optimization": {"stage3_prefetch_bucket_size": 0}}
    for depth in (2, 4):
        engine = engine_of(world, world.size, 3, 1, deepspeed=nothing_ahead, depth=depth)
        step(engine, world, 0, world.size)
        step(engine, world, 1, world.size)
        with _Operations() as seen:
            step(engine, world, 2, world.size)
        report[depth] = seen.counts["c10d::_allgather_base_"]
    if world.is_main:
        Path(arguments["out"]).write_text(json.dumps(report))


def _count_reductions(optimizer, hooks):
    """Count the gradients that DeepSpeed copies into its buckets."""
    name = "reduce_independent_p_g_buckets_and_remove_grads"
    inner = getattr(optimizer, name, None)
    if inner is None:
        return

    def counted(*args):
        hooks["gradient copies"] += 1
        return inner(*args)

    setattr(optimizer, name, counted)
