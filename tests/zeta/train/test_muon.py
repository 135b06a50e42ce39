"""Muon: which weights it takes, how, and where it is refused."""

import json
import re
import shutil
import weakref

import pytest
import torch
from torch import nn

from tests.zeta.training import tiny_navit
from zeta import MegaVit
from zeta.checkpoint.directory import load_full_weights
from zeta.distributed import compiler_available
from zeta.exit_codes import RunError
from zeta.models.parameters import block_matrices
from zeta.models.text_tower import TextTower
from zeta.run.directory import RunDir
from zeta.train.config import OptimConfig, TrainConfig
from zeta.train.engine import TrainEngine
from zeta.train.execution import (
    Need,
    Shape,
    choose_execution,
    memory_message,
    out_of_memory_message,
)
from zeta.train.memory_model import state_memory
from zeta.train.optim import build_optimizer, check_optimizer, state_per_weight
from zeta.train.optimizers.table import highest_stage, optimizer_name
from zeta.train.resume import check_same_optimizer

GIB = 2**30
MUON = OptimConfig(kind="muon", lr=1e-2, weight_decay=0.1, head_weight_decay=0.3)


def test_the_matrices_of_the_blocks_are_its_own_and_nothing_else():
    names = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}
    rows = block_matrices(tiny_navit(depth=2))
    expected = {f"blocks.{i}.{name}.weight": parts for i in (0, 1) for name, parts in names.items()}
    assert {name: len(each) for name, each in rows.items()} == expected
    tower = TextTower(vocab_size=9, max_tokens=4, dim=8, depth=1, heads=1, mlp_dim=16, embed_dim=8)
    assert {name.split(".")[0] for name in block_matrices(tower)} == {"blocks"}
    assert not block_matrices(nn.Linear(4, 4))


def test_a_weight_that_stacks_matrices_of_unequal_rows_is_split_between_them():
    rows = block_matrices(MegaVit(16, 8, 3, 32, 1, 2, 96, dim_head=8))
    assert rows["blocks.0.in_proj.weight"] == [96, 16, 16, 16]  # MLP, q, k and v
    assert rows["blocks.0.attn_out_proj.weight"] == [32]
    gated = block_matrices(tiny_navit(gated_mlp=True, mlp_dim=24))
    assert gated["blocks.0.mlp.fc1.weight"] == [24, 24]


def test_matrices_move_as_torchs_muon_moves_each_alone_and_the_rest_as_in_adamw():
    model, reference = tiny_navit(), tiny_navit()
    rows = block_matrices(model)
    named = dict(reference.named_parameters())
    alone = {
        n: [nn.Parameter(m.clone()) for m in named[n].detach().split(r)] for n, r in rows.items()
    }
    rates = {n: 0.1 if p.ndim == 2 else 0.0 for n, p in named.items()} | {"head.weight": 0.3}
    muon = torch.optim.Muon(
        [part for parts in alone.values() for part in parts],
        lr=1e-2,
        weight_decay=0.1,
        adjust_lr_fn="match_rms_adamw",
    )
    rest = [{"params": [p], "weight_decay": rates[n]} for n, p in named.items() if n not in rows]
    adamw = torch.optim.AdamW(rest, lr=1e-2, betas=MUON.betas, fused=True)
    optimizer = build_optimizer(model, MUON)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if name in rows:
                for part, gradient in zip(
                    alone[name], parameter.grad.split(rows[name]), strict=True
                ):
                    part.grad = gradient.clone()
            else:
                named[name].grad = parameter.grad.clone()
        for each in (optimizer, muon, adamw):
            each.step()
    for name, parameter in model.named_parameters():
        expected = torch.cat(alone[name]) if name in rows else named[name]
        assert torch.equal(parameter, expected), name
        kept = {key for key, value in optimizer.state[parameter].items() if value.ndim}
        assert kept == ({"momentum_buffer"} if name in rows else {"exp_avg", "exp_avg_sq"}), name


def test_a_matrix_without_a_gradient_stays_as_it_is():
    model = tiny_navit()
    optimizer = build_optimizer(model, MUON)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.blocks[0].attn.proj.weight.grad = None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    unchanged = [name for name, p in model.named_parameters() if torch.equal(before[name], p)]
    assert unchanged == ["blocks.0.attn.proj.weight"]


def test_gradients_are_freed_after_a_step():
    model, freed = tiny_navit(), []
    optimizer = build_optimizer(model, MUON)
    for name, parameter in model.named_parameters():
        parameter.grad = torch.ones_like(parameter)
        weakref.finalize(parameter.grad.untyped_storage(), freed.append, name)
    optimizer.step()
    assert not freed
    model.zero_grad()
    assert sorted(freed) == sorted(name for name, _ in model.named_parameters())


def test_its_memory_is_one_moment_for_matrices_and_two_for_the_rest():
    model = tiny_navit()
    matrices = sum(model.get_parameter(name).numel() for name in block_matrices(model))
    sizes = [parameter.numel() for parameter in model.parameters()]
    moments = state_per_weight(MUON, model)
    assert moments * sum(sizes) == pytest.approx(2 * sum(sizes) - matrices)
    held = state_memory(sizes, TrainConfig(zero_stage=0), 2, moments=moments).optimizer
    assert held == 4 * (2 * sum(sizes) - matrices)
    model.blocks.requires_grad_(False)
    assert state_per_weight(MUON, model) == 2


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("optim", "train", "message"),
    [
        (
            {},
            {"zero_stage": 1},
            "but train.zero_stage=1 asks for parts of them on each rank: set "
            "train.zero_stage=0 or auto, or optim.kind=adamw",
        ),
        ({}, {"zero_stage": 2}, "but train.zero_stage=2 asks"),
        ({}, {"zero_stage": 3}, "but train.zero_stage=3 asks"),
        ({}, {"deepspeed": OFFLOAD}, "train.deepspeed.zero_optimization.offload_optimizer asks"),
        (
            {},
            {"trainable": "head"},
            "no matrix of a transformer block learns: set optim.kind=adamw",
        ),
        (
            {"ns_coefficients": [1, 2]},
            {},
            "optim.params is {'ns_coefficients': [1, 2]}, which the ",
        ),
        ({"adjust_lr_fn": "none"}, {}, "optim.params is {'adjust_lr_fn': 'none'}, which the optim"),
        ({"betas": [0, 0]}, {}, "optim.params.betas is decided by optim.betas"),
        ({"rho": 1}, {}, "optim.params.rho: the optimizer muon does not take it; choose from mom"),
    ],
)
def test_what_cannot_work_is_refused_by_name_before_a_run(optim, train, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_optimizer(OptimConfig(kind="muon", params=optim), TrainConfig(**train))


def test_what_it_runs_with_passes():
    for train in ({}, {"zero_stage": 0}, {"trainable": "last-1"}):
        check_optimizer(OptimConfig(kind="muon", params={"momentum": 0.9}), TrainConfig(**train))


def test_an_engine_at_a_stage_with_shards_is_refused():
    with pytest.raises(ValueError, match=r"optim.kind is muon, which needs the matrices whole"):
        TrainEngine(tiny_navit(), None, None, TrainConfig(zero_stage=2), MUON)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no matrix of a transformer block learns"):
        build_optimizer(nn.Linear(4, 4), MUON)


def test_a_torch_without_it_is_refused_when_the_config_is_read(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(
        ValueError, match=r"has no torch\.optim\.Muon: install torch 2\.10 or newer"
    ):
        OptimConfig(kind="muon")


def test_auto_never_chooses_a_stage_with_shards_for_it():
    need = Need(lambda stage: (30, 20, 15, 8)[stage] * GIB, 2 * GIB)
    shape = Shape(packs=30, token_budget=4096, width=768, joint=False)
    highest = highest_stage("muon")
    for memory in (141, 60, 40, 33):
        assert choose_execution(TrainConfig(), need, shape, memory * GIB, highest).stage == 0
    assert choose_execution(TrainConfig(), need, shape, 33 * GIB).stage == 1
    with pytest.raises(ValueError, match=r"at ZeRO stage 0 it needs .* optim.kind that can be sha"):
        choose_execution(TrainConfig(), need, shape, 30 * GIB, highest)


def test_messages_about_memory_name_no_stage_that_it_cannot_take():
    need = Need(lambda _: 8 * GIB, GIB)
    for message in (
        memory_message(need, 0, 1, GIB, highest_stage("muon")),
        out_of_memory_message(TrainConfig(), RuntimeError("full"), highest_stage("muon")),
    ):
        assert "optim.kind that can be sharded" in message
        assert "zero_stage to auto or higher" not in message


def test_a_run_of_another_optimizer_does_not_go_on_with_it():
    with pytest.raises(RunError, match=r"has the state of AdamW, but optim.kind asks for Muon"):
        check_same_optimizer("AdamW", optimizer_name("muon"), "step_1")


@pytest.mark.slow
def test_a_run_goes_on_after_a_checkpoint_on_fewer_and_on_more_ranks(ranks, tmp_path):
    optim = {"kind": "muon", "lr": 1e-3, "schedule": "constant"}
    job = "tests.zeta.trainer_jobs.train"

    def train(name, world_size, steps):
        settings = {"packs_per_step": 3, "max_steps": steps, "dtype": "fp32"}
        run = {"run_dir": str(tmp_path / name), "train": settings, "optim": optim}
        ranks.run(job, world_size, run)
        return load_full_weights(RunDir(tmp_path / name).checkpoints / f"step_{steps:08d}")

    train("some", 2, 2)
    shutil.copytree(tmp_path / "some", tmp_path / "more")
    whole = train("whole", 2, 4)
    for name, world_size in (("some", 1), ("more", 3)):
        trained = train(name, world_size, 4)
        for parameter, value in whole.items():
            torch.testing.assert_close(trained[parameter], value, rtol=0, atol=1e-4)


def _ways(ranks, tmp_path, world_size, *ways):
    out = tmp_path / f"{world_size}.json"
    ranks.run("tests.zeta.train.muon_jobs.ways", world_size, {"out": str(out), "ways": ways})
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_packs_joined_and_passes_replayed_change_nothing_for_any_objective(
    ranks, tmp_path, world_size
):
    """Replayed passes stand for CUDA graphs: the optimizer's step is outside of them."""
    joined = [f"{kind} {way}" for kind in ("softmax", "siglip", "lejepa") for way in ("", "joined")]
    report = _ways(ranks, tmp_path, world_size, *joined, "softmax replayed")
    assert report["softmax replayed"]["replays"] > 0
    for way, found in report.items():
        wanted = report[f"{way.partition(' ')[0]} "]["weights"]
        assert found["weights"] == pytest.approx(wanted, abs=1e-5), way
        assert max(abs(value) for value in wanted) < 100, way


@pytest.mark.slow
def test_the_moving_average_follows_the_weights_that_it_moves(ranks, tmp_path):
    found = _ways(ranks, tmp_path, 2, "softmax averaged")["softmax averaged"]
    assert found["average"] == pytest.approx(found["expected average"], abs=1e-6)
    assert found["average"] != pytest.approx(found["weights"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not compiler_available(), reason="there is no C++ compiler")
def test_compiled_blocks_train_as_plain_ones(ranks, tmp_path):
    report = _ways(ranks, tmp_path, 1, "softmax compiled", "softmax undropped")
    compiled, plain = report["softmax compiled"], report["softmax undropped"]
    assert (compiled["compiled"], plain["compiled"]) == (True, False)
    assert compiled["weights"] == pytest.approx(plain["weights"], abs=1e-5)
