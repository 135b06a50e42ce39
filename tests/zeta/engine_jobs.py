"""Jobs of test_engine: they run on every rank of a world and write what rank 0 saw."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import deepspeed
import pytest
import torch

import zeta.zero.engine
from tests.zeta.training import NUM_CLASSES, lane_pack, shard_small_parameters, tiny_navit
from zeta.exit_codes import RunError
from zeta.objectives import build_objective
from zeta.objectives.config import ObjectiveConfig
from zeta.train.config import OptimConfig, TrainConfig
from zeta.train.engine import TrainEngine
from zeta.zero.build import build_for_training
from zeta.zero.start import close_distributed, init_distributed

shard_small_parameters()
OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1, head_weight_decay=3.0, clip=0.5)


def build(world, packs_per_step, stage, dtype="fp32", optim=OPTIM, **options):
    """An engine on a tiny NaViT."""
    train = TrainConfig(packs_per_step=packs_per_step, zero_stage=stage, dtype=dtype, **options)
    return TrainEngine(tiny_navit(), objective(), world, train, optim)


def objective():
    return build_objective(ObjectiveConfig(label_smoothing=0.1), NUM_CLASSES)


def step(engine, world, index, packs_per_step, lr=1e-3):
    """Train on the packs of this rank's lanes; missing lanes are empty packs."""
    lanes = range(world.rank, packs_per_step, world.size)
    packs = [lane_pack(index, lane) for lane in lanes]
    missing = engine.packs_per_rank - len(packs)
    packs += [lane_pack(index, 0, images=0)] * missing
    images = int(world.sum([sum(pack.num_images for pack in packs)])[0])
    seeds = [1000 * index + lane for lane in (*lanes, *[0] * missing)]
    return engine.train_step(packs, images, seeds=seeds, lr=lr), images


def weights(engine):
    """All weights, gathered from the shards."""
    parameters = list(engine.module.parameters())
    sharded = hasattr(parameters[0], "ds_id")
    with deepspeed.zero.GatheredParameters(parameters, enabled=sharded):
        return {n: p.detach().clone() for n, p in engine.module.named_parameters()}


def plain_loop(packs_per_step, steps, build_optimizers=None):
    """The reference: one process, no DeepSpeed, one loss over all images of a step."""
    model, loss = tiny_navit(), objective()
    named = dict(model.named_parameters())
    rates = {name: 0.1 if p.ndim == 2 else 0.0 for name, p in named.items()} | {"head.weight": 3.0}
    groups = [{"params": [p], "weight_decay": rates[name]} for name, p in named.items()]
    optimizers = [torch.optim.AdamW(groups, lr=1e-3, betas=OPTIM.betas)]
    if build_optimizers is not None:
        optimizers = build_optimizers(named, groups)
    losses = []
    for index in range(steps):
        packs = [lane_pack(index, lane) for lane in range(packs_per_step)]
        images = sum(pack.num_images for pack in packs)
        total = sum(loss.loss_sum(model(pack), pack) for pack in packs) / images
        model.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(total.item())
    return losses, {name: p.detach() for name, p in named.items()}


def exactness(arguments):
    """Every stage and accumulation of one world against the plain loop, after 5 steps."""
    world = init_distributed()
    report = {}
    for packs_per_step in arguments["packs_per_step"]:
        losses, reference = plain_loop(packs_per_step, 5)
        for stage in range(4):
            engine = build(world, packs_per_step, stage)
            results = [step(engine, world, index, packs_per_step) for index in range(5)]
            loss_error = max(
                abs(r.loss_sum / images - loss)
                for (r, images), loss in zip(results, losses, strict=True)
            )
            trained = weights(engine)
            weight_error = max(
                (trained[name] - value).abs().max().item() for name, value in reference.items()
            )
            report[f"P={packs_per_step} stage={stage}"] = (loss_error, weight_error)
    _write(world, arguments, report)


def muon(arguments):
    """Muon at ZeRO 0 against torch's own Muon and AdamW in a plain loop, after 5 steps.

    Torch iterates in bf16, where the last bit of a gradient may change the third digit of an
    update. So it is also compared with iterations in fp32.
    """
    world = init_distributed()
    optim = replace(OPTIM, kind="muon", lr=1e-3)
    report = {}
    for packs in arguments["packs_per_step"]:
        for iterations in ("bf16", "fp32"):
            with pytest.MonkeyPatch.context() as patch:
                if iterations == "fp32":
                    patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
                losses, reference = plain_loop(packs, 5, _plain_muon)
                engine = build(world, packs, "auto", optim=optim)
                results = [step(engine, world, index, packs) for index in range(5)]
            trained = weights(engine)
            report[f"P={packs}, iterations in {iterations}"] = {
                "loss error": max(
                    abs(r.loss_sum / images - loss)
                    for (r, images), loss in zip(results, losses, strict=True)
                ),
                "weight error": max(
                    (trained[n] - value).abs().max().item() for n, value in reference.items()
                ),
                "clipped": any(r.grad_norm > optim.clip for r, _ in results),
            }
    _write(world, arguments, report)


def _plain_muon(named, groups):
    """Torch's Muon for the matrices of the blocks, q, k and v apart; AdamW for the rest."""
    alone = {n: p for n, p in named.items() if n.startswith("blocks.") and p.ndim == 2}
    whole = [p for n, p in alone.items() if "qkv" not in n]
    for name in (n for n in alone if "qkv" in n):
        for rows in alone[name].detach().chunk(3):
            rows.requires_grad_()
            whole.append(rows)
            _pass_gradient(alone[name], rows, rows.storage_offset() // rows.shape[1])
    taken = {id(p) for p in alone.values()}
    rest = [group for group in groups if id(group["params"][0]) not in taken]
    return [
        torch.optim.Muon(whole, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-3, betas=OPTIM.betas),
    ]


def _pass_gradient(weight, rows, start):
    """Let `rows` of a weight see the weight's gradient, in whose place it is also clipped."""

    def share(parameter):
        rows.grad = parameter.grad[start : start + len(rows)]

    weight.register_post_accumulate_grad_hook(share)


def fine_tuning(arguments):
    """Frozen parts and layer decay at every stage against a plain loop, after 4 steps."""
    world = init_distributed()
    report = {}
    for trainable in ("head", "last-1", "all"):
        losses, reference = _plain_fine_tuning(trainable)
        for stage in range(4):
            train = TrainConfig(packs_per_step=3, zero_stage=stage, dtype="fp32")
            train.trainable = trainable
            model = build_for_training(
                partial(tiny_navit, seed=train.seed),
                train.zero,
                world,
                trainable=train.trainable,
                seed=train.seed,
            )
            optim = replace(OPTIM, layer_decay=0.5)
            engine = TrainEngine(model, objective(), world, train, optim)
            before = weights(engine)
            results = [step(engine, world, index, 3) for index in range(4)]
            after = weights(engine)
            errors = [(after[n] - value).abs().max().item() for n, value in reference.items()]
            report[f"{trainable}, stage {stage}"] = {
                "loss error": max(
                    abs(r.loss_sum / images - loss)
                    for (r, images), loss in zip(results, losses, strict=True)
                ),
                "weight error": max(errors),
                "changed": [n for n in after if not torch.equal(before[n], after[n])],
                "optimizer elements": sum(owned.length for owned in engine.sharded.owned_ranges()),
            }
    _write(world, arguments, report)


def _plain_fine_tuning(trainable):
    """One process, one rate a layer, with torch alone; depth 2."""
    model, loss = tiny_navit(), objective()
    first = {"head": ("head.",), "last-1": ("blocks.1.", "norm.", "attn_pool.", "head.")}
    rates = {"embeds": 1e-3 / 8, "blocks.0": 1e-3 / 4, "blocks.1": 1e-3 / 2}
    groups = []
    for name, parameter in model.named_parameters():
        if not name.startswith(first.get(trainable, ("",))):
            parameter.requires_grad_(False)
            continue
        decay = 3.0 if name == "head.weight" else 0.1 if parameter.ndim == 2 else 0.0
        lr = next((r for part, r in rates.items() if name.startswith(part)), 1e-3)
        groups.append({"params": [parameter], "lr": lr, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=OPTIM.betas)
    losses = []
    for index in range(4):
        packs = [lane_pack(index, lane) for lane in range(3)]
        images = sum(pack.num_images for pack in packs)
        total = sum(loss.loss_sum(model(pack), pack) for pack in packs) / images
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(total.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def sharded_construction(arguments):
    """ZeRO-3 on a model that was never whole: weights at the start, and after a step."""
    world = init_distributed()
    train = TrainConfig(packs_per_step=2, zero_stage=3, dtype="fp32", seed=7)
    train.activation_checkpointing = True
    trained = []
    for sharded in (True, False):
        build = partial(tiny_navit, seed=7)
        model = (
            build_for_training(build, train.zero, world, trainable=train.trainable, seed=train.seed)
            if sharded
            else build()
        )
        held = sum(p.numel() for p in model.parameters())
        engine = TrainEngine(model, objective(), world, train, OPTIM)
        before = weights(engine)
        step(engine, world, 1, 2)
        trained.append((held, before, weights(engine)))
    differences = [
        max((a[name] - b[name]).abs().max().item() for name in a)
        for a, b in zip(trained[0][1:], trained[1][1:], strict=True)
    ]
    _write(world, arguments, {"held": [t[0] for t in trained], "differences": differences})


def compiled(arguments):
    """Compiled blocks, whose activations are recomputed, against the plain loop, after 3 steps."""
    world = init_distributed()
    losses, reference = plain_loop(2, 3)
    report = {}
    for stage in arguments["stages"]:
        engine = build(world, 2, stage, compile="true", activation_checkpointing=True)
        results = [step(engine, world, index, 2) for index in range(3)]
        trained = weights(engine)
        report[f"stage={stage}"] = {
            "compiled": all(b._compiled_call_impl is not None for b in engine.module.blocks),
            "loss error": max(
                abs(r.loss_sum / images - loss)
                for (r, images), loss in zip(results, losses, strict=True)
            ),
            "weight error": max(
                (trained[name] - value).abs().max().item() for name, value in reference.items()
            ),
        }
    _write(world, arguments, report)


class _PoisonGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def _poison(engine, kind):
    clean = engine.objective.loss_sum

    def poisoned(outputs, batch):
        if kind == "gradient":  # the loss stays finite
            return clean(_PoisonGradient.apply(outputs), batch)
        return clean(outputs, batch) * float("nan")

    engine.objective.loss_sum = poisoned
    return clean


def nonfinite(arguments):
    """NaN on the last rank at one step: nothing changes, and training goes on as without it."""
    world = init_distributed()
    report = {}
    for dtype in ("fp32", "bf16"):
        for stage in range(4):
            for kind in ("loss", "gradient"):
                engine = build(world, 4, stage, dtype)
                step(engine, world, 0, 4)
                before = weights(engine)
                clean = engine.objective.loss_sum
                if world.rank == world.size - 1:
                    _poison(engine, kind)
                poisoned, _ = step(engine, world, 1, 4)
                engine.objective.loss_sum = clean
                after = weights(engine)
                untouched = all(torch.equal(before[n], after[n]) for n in before)
                result, _ = step(engine, world, 2, 4)
                resumed = weights(engine)
                twin = build(world, 4, stage, dtype)
                step(twin, world, 0, 4)
                expected, _ = step(twin, world, 2, 4)
                wanted = weights(twin)
                report[f"{dtype} stage={stage} {kind}"] = {
                    "poisoned step applied": poisoned.applied,
                    "weights untouched": untouched,
                    "next step applied": result.applied,
                    "next step as if nothing happened": result == expected
                    and all(torch.equal(resumed[n], wanted[n]) for n in wanted),
                    "flags": world.gather(poisoned.applied),
                }
    _write(world, arguments, report)


def average(arguments):
    """The moving average at every stage against one of the whole weights, over a skipped step."""
    world = init_distributed()
    report = {}
    for stage in range(4):
        engine = build(world, 4, stage, ema_decay=0.3)
        twin = build(world, 4, stage)
        expected, updates = weights(engine), 0
        for index in range(5):
            clean = engine.objective.loss_sum
            if index == 2:
                _poison(engine, "loss")
            result, _ = step(engine, world, index, 4)
            engine.objective.loss_sum = clean
            if index != 2:
                step(twin, world, index, 4)
            if result.applied:
                decay = min(0.3, (1 + updates) / (10 + updates))
                updates += 1
                trained = weights(engine)
                for name, value in expected.items():
                    value.lerp_(trained[name], 1 - decay)
            with engine.average.as_weights():  # in between, it must leave no trace
                averaged = weights(engine)
                packs = [lane_pack(0, 0)]
                outputs = engine.sharded.forward(packs[0]).detach()
        with torch.no_grad():
            plain = tiny_navit()
            plain.load_state_dict(expected, strict=False)
            outputs_error = (plain(packs[0]) - outputs).abs().max().item()
        ours, theirs = weights(engine), weights(twin)
        report[f"stage={stage}"] = {
            "updates": engine.average.updates,
            "error": max((averaged[n] - v).abs().max().item() for n, v in expected.items()),
            "outputs error": outputs_error,
            "distance to weights": max((averaged[n] - ours[n]).abs().max().item() for n in ours),
            "training is untouched": all(torch.equal(ours[n], theirs[n]) for n in ours),
        }
    _write(world, arguments, report)


def other_layout(arguments):
    """The message of each rank where DeepSpeed's map of the weights misses a part of rank 1's."""
    world = init_distributed()
    report = {}
    original = zeta.zero.engine.find_ranges
    zeta.zero.engine.find_ranges = lambda *args: original(*args)[world.rank :]
    for stage in (1, 2, 3):
        with pytest.raises(RunError) as refused:
            build(world, 2, stage)
        report[f"stage={stage}"] = world.gather(str(refused.value))
    _write(world, arguments, report)


def bf16(arguments):
    """Losses of 8 steps in bf16 at each stage, and the dtype that weights are kept in."""
    world = init_distributed()
    losses, _ = plain_loop(4, 8)
    report = {"fp32": losses}
    for stage in range(4):
        engine = build(world, 4, stage, "bf16")
        results = [step(engine, world, index, 4) for index in range(8)]
        report[f"stage {stage}"] = [r.loss_sum / images for r, images in results]
        report[f"dtype {stage}"] = str(next(iter(weights(engine).values())).dtype)
    _write(world, arguments, report)


def _write(world, arguments, report):
    if world.is_main:
        Path(arguments["out"]).write_text(json.dumps(report))
    close_distributed()
