"""Jobs of test_deepspeed_passthrough: they run on every rank and write what rank 0 saw."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from deepspeed.runtime.config import DeepSpeedConfig

from tests.zeta.engine_jobs import OPTIM, _poison, objective, step, weights
from tests.zeta.foreign_optimizer import Lion
from tests.zeta.training import tiny_navit
from zeta.checkpoint.store import CheckpointStore
from zeta.train.config import TrainConfig
from zeta.train.engine import TrainEngine
from zeta.train.optimizers.table import OPTIMIZERS
from zeta.zero.start import close_distributed, init_distributed

OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


def _engine(world, stage, settings, optim=OPTIM, **options):
    train = TrainConfig(
        packs_per_step=4, zero_stage=stage, dtype="fp32", deepspeed=settings, **options
    )
    return TrainEngine(tiny_navit(), objective(), world, train, optim)


class _Watched(dict):
    """A config that notes which keys are looked for."""

    def __init__(self, values, read):
        super().__init__(values)
        self.read = read

    def __contains__(self, key):
        self.read.add(key)
        return super().__contains__(key)

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def keys(self):
        return self  # only asked for what they contain

    def __copy__(self):
        return self


def keys_read(arguments):
    """The top-level keys of its config that DeepSpeed reads."""
    world = init_distributed()
    read = set()
    DeepSpeedConfig(_Watched({"train_micro_batch_size_per_gpu": 1}, read))
    _write(world, arguments, sorted(read))


def offload(arguments):
    """Six steps with the optimizer in host memory and without, two of them not finite."""
    world = init_distributed()
    report = {}
    for stage in (1, 2, 3):
        engine, twin = (
            _engine(world, stage, settings, ema_decay=0.5) for settings in (OFFLOAD, {})
        )
        applied, norms, unchanged = [], [], []
        for index in range(6):
            for each in (engine, twin):
                clean, before = each.objective.loss_sum, weights(each)
                if index in (2, 3) and world.rank == world.size - 1:
                    _poison(each, ("loss", "gradient")[index - 2])
                result, _ = step(each, world, index, 4)
                each.objective.loss_sum = clean
                if each is engine:
                    applied.append(result.applied)
                    norms.append(result.grad_norm)
                    if not result.applied:
                        after = weights(each)
                        unchanged.append(all(torch.equal(before[n], after[n]) for n in before))
        ours, theirs = weights(engine), weights(twin)
        with engine.average.as_weights(), twin.average.as_weights():
            ours |= {f"ema/{n}": v for n, v in weights(engine).items()}
            theirs |= {f"ema/{n}": v for n, v in weights(twin).items()}
        report[f"stage={stage}"] = {
            "it is in host memory": bool(engine.sharded.deepspeed.zero_use_cpu_optimizer()),
            "error": max((ours[n] - theirs[n]).abs().max().item() for n in theirs),
            "clipped": max(n for n in norms if n == n) > OPTIM.clip,
            "applied": applied,
            "skipped steps changed nothing": all(unchanged),
        }
    _write(world, arguments, report)


def resume(arguments):
    """Whether a run that was saved after 2 of 4 steps ends as one that was not, bit by bit."""
    world = init_distributed()
    report = {}
    folder = Path(world.broadcast(tempfile.mkdtemp(dir=Path(arguments["out"]).parent)))
    for stage, settings, *more in arguments["cases"]:
        name = f"{settings} {more} stage={stage}"
        optim = replace(OPTIM, **more[0]) if more else OPTIM
        whole, first, second = (_engine(world, stage, settings, optim) for _ in range(3))
        for index in range(4):
            step(whole, world, index, 4)
        for index in range(2):
            step(first, world, index, 4)
        store = CheckpointStore(folder / str(len(report)), world, 1, None, say=print)
        state = {"zero_stage": stage}
        state["parameters"] = {n: list(v.shape) for n, v in weights(first).items()}
        store.begin(first, 2, state, "")
        error = store.finish()
        assert error is None, error
        store.load(store.newest_verified(), second)
        for index in range(2, 4):
            step(second, world, index, 4)
        begun, ours, theirs = (weights(each) for each in (first, second, whole))
        report[name] = all(torch.equal(ours[n], theirs[n]) for n in theirs) and not any(
            torch.equal(ours[n], begun[n]) for n in ("head.weight", "embeds.proj.weight")
        )
    _write(world, arguments, report)


def resume_lion(arguments):
    """`resume` with an optimizer from outside of zeta in the table."""
    OPTIMIZERS["lion"] = Lion
    resume(arguments)


def _write(world, arguments, report):
    if world.is_main:
        Path(arguments["out"]).write_text(json.dumps(report))
    close_distributed()
