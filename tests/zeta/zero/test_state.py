"""Parameters put together from the shards of DeepSpeed's files."""

import pytest
import torch

from tests.zeta.training import tiny_navit
from zeta.checkpoint.directory import FORMAT, load_full_weights, read_trainer_state
from zeta.models.parameters import parameter_shapes
from zeta.zero.state import ZeroState
from zeta.zero.unnamed_order import unnamed_order

JOB = "tests.zeta.trainer_jobs.train"


def test_any_range_of_a_parameter_is_read_across_its_pieces(tmp_path):
    zero = tmp_path / "zero"
    zero.mkdir()
    whole = torch.arange(10.0)
    shapes = {"w": [2, 5]}
    groups = [{"w": torch.Size([2, 5])}]
    model = {"module": {}, "buffer_names": [], "param_shapes": groups}
    torch.save(model, zero / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for rank in range(12):  # one element each, two ranks of padding: rank 10 comes after rank 2
        held = whole[rank : rank + 1] if rank < 10 else torch.full((1,), float("nan"))
        own = {"step": torch.tensor(3.0), "exp_avg": held + 100, "exp_avg_sq": held + 200}
        optimizer = {"state": {0: own}}
        shard = {"fp32_flat_groups": [held], "partition_count": 12}
        torch.save(
            {"optimizer_state_dict": shard | {"optimizer_state_dict": optimizer}},
            zero / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
    state = ZeroState(zero, 3, shapes, tmp_path / "average")
    assert not state.has_average
    assert state.counts == {"step": 3}
    assert state.moments == ["exp_avg", "exp_avg_sq"]
    assert torch.equal(state.full("w"), whole.reshape(2, 5))
    for start in range(10):
        for length in range(1, 11 - start):
            expected = whole[start : start + length]
            assert torch.equal(state.read("w", "fp32", start, length), expected)
            assert torch.equal(state.read("w", "exp_avg_sq", start, length), expected + 200)


def test_moments_of_stage_0_are_read_in_the_order_that_the_checkpoint_names(tmp_path):
    zero = tmp_path / "zero"
    zero.mkdir()
    weights = {"norm.weight": torch.zeros(4), "body.weight": torch.zeros(4, 1)}
    moments = {0: {"exp_avg": torch.full((4,), 10.0)}, 1: {"exp_avg": torch.full((4, 1), 11.0)}}
    model = {"module": weights, "buffer_names": [], "optimizer": {"state": moments}}
    torch.save(model, zero / "mp_rank_00_model_states.pt")
    shapes = {name: list(value.shape) for name, value in weights.items()}
    for order, numbered in [
        (["norm.weight", "body.weight"], {"norm.weight": 10.0, "body.weight": 11.0}),
        (["body.weight", "norm.weight"], {"norm.weight": 11.0, "body.weight": 10.0}),
        (None, {"norm.weight": 11.0, "body.weight": 10.0}),  # by the rule of weight decay
    ]:
        state = ZeroState(zero, 0, shapes, tmp_path / "average", order=order)
        read = {name: state.full(name, "exp_avg").unique().item() for name in shapes}
        assert read == numbered


def _of_stage_0(folder, moments):
    """A state of parameters of one weight, whose optimizer keeps the named values."""
    folder.mkdir()
    order = list(moments)
    kept = {i: dict.fromkeys(moments[name], torch.ones(1)) for i, name in enumerate(order)}
    weights = {name: torch.zeros(1) for name in order}
    model = {"module": weights, "buffer_names": [], "optimizer": {"state": kept}}
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    return ZeroState(folder, 0, {name: [1] for name in order}, folder / "average", order=order)


def test_each_parameter_has_the_moments_that_its_optimizer_keeps(tmp_path):
    adam, muon = ["exp_avg", "exp_avg_sq"], ["momentum_buffer"]
    kept = _of_stage_0(tmp_path / "whole", {"norm": adam, "matrix": muon, "head": adam})
    assert [kept.moments_of(name) for name in ("norm", "matrix", "head")] == [adam, muon, adam]
    assert _of_stage_0(tmp_path / "none", {"norm": [], "head": []}).moments_of("norm") == []


@pytest.mark.parametrize("left", [[], ["exp_avg"]])
def test_a_parameter_whose_moments_are_missing_is_refused_by_name(tmp_path, left):
    adam = ["exp_avg", "exp_avg_sq"]
    state = _of_stage_0(tmp_path / "zero", {"norm": adam, "head": left, "matrix": ["momentum"]})
    assert set(state.moments_of("head")) >= set(adam)
    with pytest.raises(ValueError, match="have 0 of 1 values of head: they were changed"):
        state.read("head", "exp_avg_sq", 0, 1)


@pytest.mark.slow
def test_a_checkpoint_names_its_format_and_the_order_of_the_optimizer(ranks, tmp_path):
    train = {"packs_per_step": 2, "max_steps": 1, "dtype": "fp32"}
    runs = [
        {"run_dir": str(tmp_path / str(stage)), "train": {**train, "zero_stage": stage}}
        for stage in range(4)
    ]
    ranks.run(JOB, 2, {"runs": runs})
    ordered = unnamed_order(parameter_shapes(tiny_navit()))
    for stage in range(4):
        state = read_trainer_state(tmp_path / str(stage) / "checkpoints" / "step_00000001")
        assert state["format"] == FORMAT
        assert state["optimizer_order"] == ordered


@pytest.mark.slow
def test_full_weights_are_those_of_the_model_from_every_stage(ranks, tmp_path):
    runs = []
    for stage in range(4):
        train = {"packs_per_step": 2, "max_steps": 1, "zero_stage": stage, "dtype": "fp32"}
        optim = {"lr": 0.0, "schedule": "constant"}  # the weights stay as they are initialised
        runs.append({"run_dir": str(tmp_path / str(stage)), "train": train, "optim": optim})
    ranks.run(JOB, 2, {"runs": runs})
    expected = tiny_navit().state_dict()
    for stage in range(4):
        weights = load_full_weights(tmp_path / str(stage) / "checkpoints" / "step_00000001")
        assert set(weights) == set(expected)
        for name, value in expected.items():
            assert torch.equal(weights[name], value), (stage, name)
