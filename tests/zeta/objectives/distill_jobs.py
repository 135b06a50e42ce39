"""Jobs of test_distill: they run on every rank of a world and write what rank 0 saw."""

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from tests.zeta.engine_jobs import OPTIM, weights
from tests.zeta.foreign_reconstruction import MaskedPatches, Reconstruction
from tests.zeta.image_text_jobs import EMBED_DIM, captioned_pack
from tests.zeta.models.test_text_tower import ARGUMENTS
from tests.zeta.objectives.foreign_moving_teacher import MovingTeacher, StudentAndTeacher
from tests.zeta.training import BUDGET, NUM_CLASSES, shard_small_parameters, tiny_navit
from zeta.models.text_tower import TextTower
from zeta.objectives import build_objective
from zeta.objectives.base import Step
from zeta.objectives.config import DistillConfig, ObjectiveConfig
from zeta.objectives.distill_model import DistillImageTextModel, DistillModel
from zeta.objectives.teacher import Teacher
from zeta.packed import lanes_of_rank
from zeta.train.config import TrainConfig
from zeta.train.engine import TrainEngine
from zeta.zero.build import build_for_training
from zeta.zero.start import init_distributed

shard_small_parameters()
DIM = 24


def teacher(patch_size=6):
    """A teacher of another width and patch than the student's."""
    sizes = {"patch_size": patch_size, "image_size": 4 * patch_size, "dim": DIM, "heads": 3}
    return Teacher(tiny_navit(seed=9, position="grid_bilinear", pool="cls", **sizes))


def no_flops(pack):
    return 0.0


def built(kind, **changes):
    """A model and its objective, whose teacher is `teacher()`."""
    distill = DistillConfig(**({"dim": DIM, "pooled": 0.7, "tokens": 0.4, "weight": 2} | changes))
    base = kind.partition("+")[0]
    outputs = {"siglip": EMBED_DIM, "clip": EMBED_DIM, "distill": 1}.get(base, NUM_CLASSES)
    config = ObjectiveConfig(kind, embed_dim=EMBED_DIM, distill=distill)
    image = tiny_navit(num_classes=outputs)
    if base in ("siglip", "clip"):
        text = TextTower(**ARGUMENTS, embed_dim=EMBED_DIM)
        model = DistillImageTextModel(image, text, base, distill, no_flops)
    else:
        model = DistillModel(image, distill, no_flops, classifies=base != "distill")
    objective = build_objective(config, outputs)
    objective.teacher = teacher()
    return model, objective


def dropped_pack(step, lane):
    """`captioned_pack`, in which the second half of each image's patches is dropped."""
    pack = captioned_pack(step, lane)
    bounds = pack.cu_seqlens.tolist()
    kept, dropped, lengths = [], [], []
    for image, (start, stop) in enumerate(pairwise(bounds[:-1])):
        middle = start + (stop - start + 1) // 2
        kept += range(start, middle)
        dropped += [(image, row) for row in range(middle, stop)]
        lengths.append(middle - start)
    rows = [*kept, *range(bounds[-2], BUDGET), *(row for _, row in dropped)]
    away = torch.tensor([row for _, row in dropped], dtype=torch.int64)
    patches, coords = pack.patches[rows], pack.coords[rows]
    patches[len(kept) :], coords[len(kept) :] = 0, -1
    lengths.append(BUDGET - len(kept))
    return replace(
        pack,
        patches=patches,
        coords=coords,
        lengths=tuple(lengths),
        cu_seqlens=torch.tensor((0, *lengths)).cumsum(0).int(),
        dropped_patches=pack.patches[away],
        dropped_coords=pack.coords[away],
        dropped_image=torch.tensor([image for image, _ in dropped], dtype=torch.int64),
        host_grids=tuple(map(tuple, pack.grids.tolist())),
    )


def training(arguments):
    """Losses and weights after 3 steps, for each stage and number of packs in a forward pass."""
    world = init_distributed()
    total, report = arguments["packs_per_step"], {}
    for stage, packs in arguments["cases"]:
        train = TrainConfig(
            packs_per_step=total, zero_stage=stage, dtype="fp32", tokens_per_forward=packs * BUDGET
        )
        model, objective = built(arguments["kind"], loss=arguments["loss"])
        engine = TrainEngine(model, objective, world, train, OPTIM)
        losses = []
        for index in range(3):
            lanes = list(lanes_of_rank(world.rank, world.size, total))
            own = [dropped_pack(index, lane) for lane in lanes]
            images = sum(dropped_pack(index, lane).num_images for lane in range(total))
            result = engine.train_step(own, images, seeds=lanes, lr=1e-3)
            losses.append([result.loss_sum / images, *result.counts.values()])
        flat = torch.cat([value.flatten() for value in weights(engine).values()])
        report[f"stage {stage}, {packs} packs"] = {"losses": losses, "weights": flat.tolist()}
    if world.is_main:
        Path(arguments["out"]).write_text(json.dumps(report))


def reconstructing(arguments):
    """Weights of the masked autoencoder after 3 steps, by stage and packs in a forward pass."""
    world = init_distributed()
    total, report = arguments["packs_per_step"], {}
    for stage, packs in arguments["cases"]:
        train = TrainConfig(
            packs_per_step=total, zero_stage=stage, dtype="fp32", tokens_per_forward=packs * BUDGET
        )

        def build():
            return Reconstruction(tiny_navit(num_classes=1, pool="mean"), dim=16, seed=3)

        model = build_for_training(build, train.zero, world, trainable="all", seed=3)
        engine = TrainEngine(
            model, MaskedPatches(ObjectiveConfig("masked"), 1), world, train, OPTIM
        )
        for index in range(3):
            lanes = list(lanes_of_rank(world.rank, world.size, total))
            own = [dropped_pack(index, lane) for lane in lanes]
            images = sum(dropped_pack(index, lane).num_images for lane in range(total))
            engine.train_step(own, images, seeds=lanes, lr=1e-3)
        flat = torch.cat([value.flatten() for value in weights(engine).values()])
        report[f"stage {stage}, {packs} packs"] = flat.tolist()
    if world.is_main:
        Path(arguments["out"]).write_text(json.dumps(report))


def student_and_teacher(seed, **changes):
    """The model of `MovingTeacher`, of two tiny encoders."""
    image, teacher = (tiny_navit(num_classes=1, **changes) for _ in range(2))
    return StudentAndTeacher(image, teacher, seed)


def moving(arguments):
    """Weights after 3 steps with a teacher that follows its student, by stage and dtype."""
    world = init_distributed()
    total, report = arguments["packs_per_step"], {}
    for stage, dtype in arguments["cases"]:
        train = TrainConfig(packs_per_step=total, zero_stage=stage, dtype=dtype)
        train.tokens_per_forward = BUDGET
        model = build_for_training(
            partial(student_and_teacher, 3), train.zero, world, trainable="all", seed=3
        )
        objective = MovingTeacher(ObjectiveConfig("moving"), 1)
        objective.start(model)
        engine = TrainEngine(model, objective, world, train, OPTIM)
        for index in range(3):
            lanes = list(lanes_of_rank(world.rank, world.size, total))
            own = [dropped_pack(index, lane) for lane in lanes]
            images = sum(dropped_pack(index, lane).num_images for lane in range(total))
            engine.train_step(own, images, seeds=lanes, lr=1e-3)
            engine.follow_step(Step(index, seed=0, share=index / 3))
        stale = [
            layer
            for layer in engine.module.modules()
            if getattr(layer, "weight_copy", None) is not None
            and not torch.equal(layer.weight_copy, layer.weight.to(layer.weight_copy.dtype))
        ]
        flat = torch.cat([value.flatten() for value in weights(engine).values()])
        report[f"{stage} {dtype}"] = {"weights": flat.tolist(), "stale": len(stale)}
    if world.is_main:
        Path(arguments["out"]).write_text(json.dumps(report))
