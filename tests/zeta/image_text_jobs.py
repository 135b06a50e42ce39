"""Jobs of test_image_text_model: they run on every rank of a world and write what rank 0 saw."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad

from tests.zeta.models.test_text_tower import ARGUMENTS
from tests.zeta.training import BUDGET, MAX_IMAGES, lane_pack, shard_small_parameters, tiny_navit
from zeta.models.parameters import parameter_rules
from zeta.models.text_tower import TextTower
from zeta.objectives import build_objective
from zeta.objectives.config import ObjectiveConfig
from zeta.objectives.image_text_model import ImageTextModel
from zeta.objectives.pairs import ImageTextOutputs
from zeta.train.config import OptimConfig, TrainConfig
from zeta.train.engine import TrainEngine
from zeta.zero.build import build_for_training
from zeta.zero.start import close_distributed, init_distributed

EMBED_DIM = 12
TEXT_BUDGET = 64
OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1, clip=0.5)
STEPS = 3

shard_small_parameters()


def tiny_model(kind, dropout=0.0):
    text = TextTower(**ARGUMENTS, embed_dim=EMBED_DIM, dropout=dropout)
    image = tiny_navit(num_classes=EMBED_DIM, dropout=dropout)
    return ImageTextModel(image, text, kind)


def captioned_pack(step, lane, images=None):
    """`lane_pack` with a caption of 1 to 9 tokens for each image; some pairs have weight 0."""
    pack = lane_pack(step, lane, images)
    generator = torch.Generator().manual_seed(7000 + 1000 * step + lane)
    lengths = [
        int(torch.randint(1, 10, (), generator=generator)) if weight else 0
        for weight in pack.weights.tolist()
    ]
    lengths.append(TEXT_BUDGET - sum(lengths))
    weights = pack.weights.clone()
    if (step + lane) % 3 == 2 and weights[1:].any():
        weights[1] = 0  # an image that could not be decoded
    return replace(
        pack,
        weights=weights,
        text_ids=torch.randint(0, 20, (TEXT_BUDGET,), generator=generator),
        text_cu_seqlens=torch.tensor((0, *lengths)).cumsum(0).int(),
        text_lengths=tuple(lengths),
        text_cut=torch.zeros(MAX_IMAGES, dtype=torch.bool),
    )


def reference(kind, packs_per_step):
    """One process, no DeepSpeed, one matrix of logits over all pairs of a step."""
    model = tiny_model(kind)
    named = dict(model.named_parameters())
    rules = parameter_rules(model)
    groups = [
        {
            "params": [p for n, p in named.items() if (rules[n].group == "none") is none],
            "weight_decay": 0.0 if none else 0.1,
        }
        for none in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=OPTIM.betas)
    losses, gradients = [], []
    for index in range(STEPS):
        packs = [captioned_pack(index, lane) for lane in range(packs_per_step)]
        outputs = [model(pack) for pack in packs]
        used = [pack.weights > 0 for pack in packs]
        images = torch.cat([o.images[u] for o, u in zip(outputs, used, strict=True)])
        texts = torch.cat([o.texts[u] for o, u in zip(outputs, used, strict=True)])
        logits = outputs[0].scale * images @ texts.T + outputs[0].bias
        count = len(images)
        if kind == "siglip":
            loss = -F.logsigmoid((2 * torch.eye(count) - 1) * logits).sum() / count
        else:
            targets = torch.arange(count)
            loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        optimizer.zero_grad()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in named.items()})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients, {name: p.detach() for name, p in named.items()}


def build(world, kind, packs_per_step, stage, dropout=0.0, packs=1):
    train = TrainConfig(
        packs_per_step=packs_per_step,
        zero_stage=stage,
        dtype="fp32",
        tokens_per_forward=packs * BUDGET,
    )
    objective = build_objective(ObjectiveConfig(kind), EMBED_DIM)
    return TrainEngine(tiny_model(kind, dropout), objective, world, train, OPTIM)


def step(engine, world, index, packs_per_step, seed=0):
    lanes = list(range(world.rank, packs_per_step, world.size))
    packs = [captioned_pack(index, lane) for lane in lanes]
    missing = engine.packs_per_rank - len(packs)
    packs += [captioned_pack(index, 0, images=0)] * missing
    pairs = int(world.sum([sum(pack.num_images for pack in packs)])[0])
    seeds = [1000 * seed + lane for lane in (lanes + [0] * missing)]
    return engine.train_step(packs, pairs, seeds=seeds, lr=1e-3), pairs


def weights(engine):
    parameters = list(engine.module.parameters())
    sharded = hasattr(parameters[0], "ds_id")
    with deepspeed.zero.GatheredParameters(parameters, enabled=sharded):
        return {n: p.detach().clone() for n, p in engine.module.named_parameters()}


def note_gradient(engine, into):
    """Append the whole gradient of the next step, before it is clipped, to `into`."""
    finish = type(engine)._finish_step

    def noting(totals, lr):
        named = engine.module.named_parameters()
        into.append({name: safe_get_full_grad(p).clone() for name, p in named})
        return finish(engine, totals, lr)

    engine._finish_step = noting


def difference(ours, wanted):
    """Largest difference of two gradients, as a share of the largest element."""
    largest = max(value.abs().max().item() for value in wanted.values())
    apart = max((ours[n] - value).abs().max().item() for n, value in wanted.items())
    return apart / max(largest, 1e-3)  # one pair alone has nothing to learn by clip


def exactness(arguments):
    """Every loss, stage and number of packs of one world against the reference."""
    world = init_distributed()
    report = {}
    for kind in ("siglip", "clip"):
        for packs_per_step in arguments["packs_per_step"]:
            losses, wanted_gradients, wanted = reference(kind, packs_per_step)
            for stage in range(4):
                engine = build(world, kind, packs_per_step, stage)
                results, gradients = [], []
                for index in range(STEPS):
                    note_gradient(engine, gradients)
                    results.append(step(engine, world, index, packs_per_step))
                trained = weights(engine)
                report[f"{kind} P={packs_per_step} stage={stage}"] = [
                    max(abs(r.loss_sum / n - x) for (r, n), x in zip(results, losses, strict=True)),
                    max(map(difference, gradients, wanted_gradients)),
                    max((trained[n] - value).abs().max().item() for n, value in wanted.items()),
                ]
    _write(world, arguments, report)


def dropout(arguments):
    """With dropout, packs that run forward twice give the gradient of what was compared."""
    world = init_distributed()
    engine = build(world, "siglip", 2 * world.size, 0, dropout=0.3)
    engine.module.train()
    seen = []
    forward = engine._forward
    engine._forward = lambda batch, seed: seen.append(forward(batch, seed)) or seen[-1]
    step(engine, world, 2, 2 * world.size, seed=1)
    twice = [torch.equal(seen[i].images, seen[i + 2].images) for i in range(2)]
    twice += [torch.equal(seen[i].texts, seen[i + 2].texts) for i in range(2)]
    step(engine, world, 2, 2 * world.size, seed=2)
    others = torch.equal(seen[0].images, seen[4].images)
    _write(world, arguments, {"equal": twice, "another seed": others})


def nonfinite(arguments):
    """NaN in the last rank's embeddings at one step: nothing changes, and training goes on."""
    world = init_distributed()
    report = {}
    for stage in range(4):
        engine = build(world, "siglip", 4, stage)
        step(engine, world, 0, 4)
        before, forward = weights(engine), engine._forward
        if world.rank == world.size - 1:
            engine._forward = lambda batch, seed, f=forward: type(out := f(batch, seed))(
                out.images * float("nan"), *out[1:]
            )
        poisoned, _ = step(engine, world, 1, 4)
        engine._forward = forward
        after = weights(engine)
        following, _ = step(engine, world, 2, 4)
        report[stage] = [
            poisoned.applied,
            all(torch.equal(before[name], after[name]) for name in before),
            following.applied,
        ]
    _write(world, arguments, report)


def bf16(arguments):
    """Losses in bf16 at each stage beside those in fp32, with recomputed activations."""
    world = init_distributed()
    report = {"fp32": reference("siglip", 4)[0]}
    for stage in range(4):
        train = TrainConfig(packs_per_step=4, zero_stage=stage, activation_checkpointing=True)
        objective = build_objective(ObjectiveConfig("siglip"), EMBED_DIM)
        engine = TrainEngine(tiny_model("siglip"), objective, world, train, OPTIM)
        results = [step(engine, world, index, 4) for index in range(STEPS)]
        report[f"stage {stage}"] = [result.loss_sum / pairs for result, pairs in results]
    _write(world, arguments, report)


def sharded_construction(arguments):
    """ZeRO-3 on a model that was never whole: its weights at the start."""
    world = init_distributed()
    train = TrainConfig(packs_per_step=2, zero_stage=3, dtype="fp32", seed=0)
    model = build_for_training(
        partial(tiny_model, "siglip"), train.zero, world, trainable=train.trainable, seed=train.seed
    )
    held = sum(parameter.numel() for parameter in model.parameters())
    objective = build_objective(ObjectiveConfig("siglip"), EMBED_DIM)
    found = weights(TrainEngine(model, objective, world, train, OPTIM))
    whole = dict(tiny_model("siglip").named_parameters())
    same = found.keys() == whole.keys() and all(torch.equal(found[n], whole[n]) for n in whole)
    _write(world, arguments, [held, same])


def recall(arguments):
    """Recall over ranks with different numbers of pairs, against one process."""
    world = init_distributed()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(17, 4, generator=generator)
    texts = images + torch.randn(17, 4, generator=generator)
    ends = [0, 10, 10, 17] if world.size == 3 else [0, 17]
    mine = slice(ends[world.rank], ends[world.rank + 1])
    one = torch.ones(())
    tally = build_objective(ObjectiveConfig("clip"), 4).tally()
    count = len(images[mine])
    batch = SimpleNamespace(weights=torch.ones(count))
    tally.add(ImageTextOutputs(images[mine], texts[mine], one, one), batch)
    _write(world, arguments, tally.metrics())


def _write(world, arguments, report):
    everyone = world.gather(report)
    if world.is_main:
        Path(arguments["out"]).write_text(json.dumps(everyone))
    close_distributed()
