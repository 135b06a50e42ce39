"""Jobs of test_muon: they run on every rank of a world and write what rank 0 saw."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.zeta import image_text_jobs, lejepa_jobs
from tests.zeta.engine_jobs import OPTIM, objective, step, weights
from tests.zeta.train.recorded_jobs import DRAWS, Rerun
from tests.zeta.training import BUDGET, tiny_navit
from zeta.models.packed_vit import PackedViT
from zeta.objectives import build_objective
from zeta.objectives.base import Step
from zeta.objectives.view_model import ViewModel
from zeta.packed import lanes_of_rank
from zeta.train.config import TrainConfig
from zeta.train.engine import TrainEngine
from zeta.train.graphs.recorded import RecordedPasses
from zeta.zero.start import init_distributed

MUON = replace(OPTIM, kind="muon")
STEPS = 3


def ways(arguments):
    """Weights after 3 steps of each way to run: packs joined, replayed, compiled, averaged.

    Torch iterates in bf16, where the last bit of a gradient may change the third digit of an
    update; here it does in fp32.
    """
    world = init_distributed()
    report = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
        for name in arguments["ways"]:
            kind, _, way = name.partition(" ")
            train = TrainConfig(
                packs_per_step=2 * world.size,
                zero_stage=0,
                dtype="fp32",
                tokens_per_forward=BUDGET * (99 if way == "joined" else 1),
                ema_decay=0.9 if way == "averaged" else None,
                compile="true" if way == "compiled" else "false",
            )
            run = {"softmax": _softmax, "siglip": _siglip, "lejepa": _lejepa}[kind]
            report[name] = run(world, train, way)
    if world.is_main:
        Path(arguments["out"]).write_text(json.dumps(report))


def _softmax(world, train, way):
    draws = {} if way in ("compiled", "undropped") else DRAWS
    engine = TrainEngine(tiny_navit(**draws), objective(), world, train, MUON)
    recorder = None
    if way == "replayed":
        recorder = Rerun()
        engine._recorded = RecordedPasses(engine.sharded, engine.objective, recorder)
        for module in engine.module.modules():
            if isinstance(module, PackedViT):
                module.reads_lengths = False
    expected, found = None, {}
    for index in range(STEPS):
        step(engine, world, index, train.packs_per_step)
        if engine.average is not None:
            ours = weights(engine)
            share = min(0.9, (1 + index) / (10 + index))
            expected = expected or {
                n: p.detach() for n, p in tiny_navit(**draws).named_parameters()
            }
            expected = {n: share * value + (1 - share) * ours[n] for n, value in expected.items()}
    if engine.average is not None:
        with engine.average.as_weights():
            found["average"] = _flat(weights(engine))
        found["expected average"] = _flat(expected)
    if recorder is not None:
        found["replays"] = recorder.replays
    blocks = engine.module.blocks
    found["compiled"] = all(block._compiled_call_impl is not None for block in blocks)
    return found | {"weights": _flat(weights(engine))}


def _siglip(world, train, way):
    built = build_objective(image_text_jobs.ObjectiveConfig("siglip"), image_text_jobs.EMBED_DIM)
    model = image_text_jobs.tiny_model("siglip", 0.2)
    engine = TrainEngine(model, built, world, train, MUON)
    for index in range(STEPS):
        image_text_jobs.step(engine, world, index, train.packs_per_step)
    return {"weights": _flat(weights(engine))}


def _lejepa(world, train, way):
    built = build_objective(lejepa_jobs.CONFIG, 1)
    model = ViewModel(tiny_navit(num_classes=1), hidden=16, dim=6)
    engine = TrainEngine(model, built, world, train, MUON)
    for index in range(STEPS):
        built.begin_step(Step(index, seed=index, share=None))
        lanes = list(lanes_of_rank(world.rank, world.size, train.packs_per_step))
        own = [lejepa_jobs.views_pack(index, lane) for lane in lanes]
        every = range(train.packs_per_step)
        images = sum(lejepa_jobs.views_pack(index, lane).num_images for lane in every)
        engine.train_step(own, images, seeds=lanes, lr=1e-3)
    return {"weights": _flat(weights(engine))}


def _flat(named):
    return torch.cat([value.flatten() for value in named.values()]).tolist()
