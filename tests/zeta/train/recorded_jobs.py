"""Jobs of test_recorded: they run on every rank of a world and write what rank 0 saw."""

import json
from dataclasses import fields, replace
from pathlib import Path

import torch

from tests.zeta.engine_jobs import OPTIM, objective, step, weights
from tests.zeta.training import BUDGET, shard_small_parameters, tiny_navit
from zeta.models.packed_vit import PackedViT
from zeta.train.config import TrainConfig
from zeta.train.engine import TrainEngine
from zeta.train.graphs.recorded import Pass, RecordedPasses
from zeta.zero.start import init_distributed

shard_small_parameters()
DRAWS = {"dropout": 0.2, "emb_dropout": 0.1, "stochastic_depth": 0.3}


class Rerun:
    """A recorder on any device: a replay runs the pass anew, and fills the tensors of the first.

    As a CUDA graph, it computes nothing before a replay, and a later replay overwrites the result.
    """

    def __init__(self, fails=False):
        self.records, self.replays, self.fails = 0, 0, fails

    def record(self, run):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.records += 1
        kept = replace_tensors(run(), lambda tensor: torch.full_like(tensor, 77))

        def replay():
            self.replays += 1
            for old, new in zip(tensors_of(kept), tensors_of(run()), strict=True):
                old.copy_(new)

        return kept, replay


def replace_tensors(found: Pass, change):
    sums = {name: change(value) for name, value in found.sums.items()}
    gradients = [None if g is None else change(g) for g in found.gradients]
    return replace(found, mean=change(found.mean), sums=sums, gradients=gradients)


def tensors_of(found: Pass):
    assert {field.name for field in fields(found)} == {"mean", "sums", "gradients"}
    return [found.mean, *found.sums.values(), *(g for g in found.gradients if g is not None)]


def engine_of(world, stage, dtype, packs, recorder, packs_per_step):
    train = TrainConfig(
        packs_per_step=packs_per_step,
        zero_stage=stage,
        dtype=dtype,
        tokens_per_forward=packs * BUDGET,
    )
    engine = TrainEngine(tiny_navit(**DRAWS), objective(), world, train, OPTIM)
    if recorder is not None:
        engine._recorded = RecordedPasses(engine.sharded, engine.objective, recorder)
    for module in engine.module.modules():
        if isinstance(module, PackedViT):
            module.reads_lengths = False  # the same order of sums in both engines
    return engine


def recorded(arguments):
    """Losses, counts and weights after 4 steps: launched, replayed, and where recording fails."""
    world = init_distributed()
    report = {}
    packs_per_step = 4 * world.size
    for stage in (0, 1, 2):
        for dtype in ("fp32", "bf16"):
            for packs in (1, 2):
                found = {}
                # On the second rank it fails: that rank goes on without, in the same order.
                cases = {"plain": None, "replay": Rerun(), "fails": Rerun(world.rank == 1)}
                for name, recorder in cases.items():
                    engine = engine_of(world, stage, dtype, packs, recorder, packs_per_step)
                    steps = [step(engine, world, i, packs_per_step)[0] for i in range(4)]
                    flat = torch.cat([w.flatten() for w in weights(engine).values()])
                    found[name] = {
                        "losses": [result.loss_sum for result in steps],
                        "counts": [result.counts["top1"] for result in steps],
                        "norms": [result.grad_norm for result in steps],
                        "weights": flat.tolist(),
                        "replays": 0 if recorder is None else recorder.replays,
                    }
                report[f"stage {stage}, {dtype}, {packs} packs"] = found
    if world.is_main:
        Path(arguments["out"]).write_text(json.dumps(report))
