"""The optimizer step: exact on every world size and ZeRO stage, and one NaN policy."""

import json

import pytest
import torch

from tests.zeta.training import tiny_navit
from zeta import MegaVit
from zeta.distributed import compiler_available
from zeta.train.config import TrainConfig
from zeta.train.engine import choose_attention, should_compile, sum_of_squares


def _report(ranks, tmp_path, job, world_size, **arguments):
    out = tmp_path / "report.json"
    ranks.run(f"tests.zeta.engine_jobs.{job}", world_size, {"out": str(out), **arguments})
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loss_and_weights_equal_a_plain_loop_on_any_ranks_stage_and_accumulation(
    ranks, tmp_path, world_size
):
    # As many packs as ranks, twice as many (accumulation 2), and one too many: empty packs.
    packs = [world_size, 2 * world_size, world_size + 1]
    report = _report(ranks, tmp_path, "exactness", world_size, packs_per_step=packs)
    assert len(report) == len(set(packs)) * 4
    for case, (loss_error, weight_error) in report.items():
        assert loss_error < 1e-5, case
        assert weight_error < 1e-5, case


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_muon_gives_the_weights_of_torchs_own_on_any_ranks_and_accumulation(
    ranks, tmp_path, world_size
):
    packs = [world_size, world_size + 1]
    report = _report(ranks, tmp_path, "muon", world_size, packs_per_step=packs)
    assert len(report) == 4
    for case, seen in report.items():
        allowed = 1e-5 if "fp32" in case else 1e-4  # the rate is 1e-3
        assert seen["loss error"] < allowed, case
        assert seen["weight error"] < allowed, case
        assert seen["clipped"], case


@pytest.mark.slow
def test_a_model_built_in_shards_for_zero_3_is_the_one_built_whole(ranks, tmp_path):
    report = _report(ranks, tmp_path, "sharded_construction", 2)
    assert report["held"][0] == 0  # what a rank holds outside of its shards, once built
    assert report["held"][1] > 1000
    assert report["differences"] == [0, 0]


@pytest.mark.slow
def test_nan_on_one_rank_changes_nothing_on_any_stage_and_dtype(ranks, tmp_path):
    report = _report(ranks, tmp_path, "nonfinite", 2)
    assert len(report) == 16
    for case, seen in report.items():
        assert seen == {
            "poisoned step applied": False,
            "weights untouched": True,
            "next step applied": True,
            "next step as if nothing happened": True,
            "flags": [False, False],
        }, case


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_moving_average_is_that_of_the_whole_weights_on_every_stage(
    ranks, tmp_path, world_size
):
    report = _report(ranks, tmp_path, "average", world_size)
    assert len(report) == 4
    for case, seen in report.items():
        assert seen["updates"] == 4, case  # of 5 steps one was not finite
        assert seen["error"] < 1e-6, case
        assert seen["outputs error"] < 1e-5, case
        assert seen["distance to weights"] > 1e-4, case
        assert seen["training is untouched"], case


@pytest.mark.slow
def test_bf16_trains_on_every_stage_with_fp32_weights(ranks, tmp_path):
    report = _report(ranks, tmp_path, "bf16", 2)
    for stage in range(4):
        assert report[f"dtype {stage}"] == "torch.float32"
        assert report[f"stage {stage}"] == pytest.approx(report["fp32"], abs=0.03)
        assert report[f"stage {stage}"] != report["fp32"]


@pytest.mark.slow
@pytest.mark.skipif(not compiler_available(), reason="there is no C++ compiler")
def test_compiled_and_recomputed_blocks_train_as_plain_ones(ranks, tmp_path):
    report = _report(ranks, tmp_path, "compiled", 1, stages=[2])  # each takes the compiler 20 s
    assert len(report) == 1
    for stage, found in report.items():
        assert found["compiled"], stage
        assert found["loss error"] < 1e-5, stage
        assert found["weight error"] < 1e-5, stage


def test_the_norm_of_gradients_is_nan_if_any_element_is():
    tensors = [torch.ones(3), torch.tensor([1.0, float("nan")])]
    assert sum_of_squares(tensors[:1], torch.device("cpu")).item() == pytest.approx(3.0)
    assert sum_of_squares(tensors, torch.device("cpu")).isnan()
    assert sum_of_squares([], torch.device("cpu")).item() == 0.0


def test_compile_is_off_without_a_compiler_and_on_when_asked(monkeypatch, tmp_path):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert should_compile("true", cpu)
    assert not should_compile("false", cuda)
    assert not should_compile("auto", cpu)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not should_compile("auto", cuda)


@pytest.mark.parametrize("arch", ["navit", "megavit"])
def test_the_back_end_of_the_config_reaches_every_layer_that_attends(arch):
    model = tiny_navit() if arch == "navit" else MegaVit(16, 4, 2, 16, 1, 2, 9)
    layers = [module for module in model.modules() if hasattr(module, "backend")]
    assert layers
    for backend in ("sdpa_segments", "auto"):
        choose_attention(model, TrainConfig(attention=backend), torch.device("cpu"))
        assert {layer.backend for layer in layers} == {backend}
    choose_attention(model.bfloat16(), TrainConfig(attention="varlen"), torch.device("cuda"))
    assert {layer.backend for layer in layers} == {"varlen"}


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [("cpu", "bf16", "needs a CUDA device"), ("cuda", "fp32", "computes in bf16 or fp16")],
)
def test_varlen_where_it_cannot_run_is_refused_before_the_first_step(device, dtype, reason):
    train = TrainConfig(attention="varlen", dtype=dtype)
    with pytest.raises(ValueError, match=rf"train.attention is varlen.*{reason}.*=auto"):
        choose_attention(tiny_navit(), train, torch.device(device))
