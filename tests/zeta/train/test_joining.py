"""Packs that go through one forward pass: speed changes, no result does; and what a step costs."""

import json

import pytest
import torch

from tests.zeta.training import lane_pack, tiny_navit
from zeta.exit_codes import RunError
from zeta.models.dropout import draws_at_random
from zeta.train.config import TrainConfig
from zeta.train.device_clock import DeviceClock
from zeta.train.engine import TrainEngine
from zeta.train.execution import Need, Shape, choose_execution, packs_per_forward
from zeta.train.pack_feed import forward_groups

GIB = 2**30


def _report(ranks, tmp_path, job, world_size, **arguments):
    out = tmp_path / f"{job}{world_size}.json"
    ranks.run(f"tests.zeta.joining_jobs.{job}", world_size, {"out": str(out), **arguments})
    return json.loads(out.read_text())


def _assert_equal(one, other, case):
    for name in set(one) - {"forwards"}:
        assert one[name] == pytest.approx(other[name], abs=1e-5), (case, name)


@pytest.mark.slow
def test_joined_packs_train_as_single_ones_with_dropout_on_every_stage_and_world(ranks, tmp_path):
    packs = {1: [1, 2, 4, 99], 2: [1, 99]}  # of 6 packs a step, also in unequal passes
    reports = {
        world: _report(ranks, tmp_path, "joining", world, packs_per_step=6, packs=many)
        for world, many in packs.items()
    }
    wanted = reports[1]["stage 0, 1 packs"]
    assert wanted["losses"][0] != wanted["losses"][1]
    for world, report in reports.items():
        for case, found in report.items():
            _assert_equal(found, wanted, f"{world} ranks, {case}")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_joint_objective_that_fits_one_forward_runs_it_once_to_the_same_weights(
    ranks, tmp_path, world_size
):
    report = _report(ranks, tmp_path, "joint", world_size, packs=[1, 2, 3])
    for kind in ("siglip", "clip"):
        found = [report[f"{kind}, {packs} packs"] for packs in (1, 2, 3)]
        assert [one["forwards"] for one in found] == [6, 6, 1]
        for one in found[1:]:
            _assert_equal(one, found[0], kind)


@pytest.mark.slow
def test_gradients_are_reduced_once_a_step_and_weights_exchanged_in_buckets(ranks, tmp_path):
    report = _report(ranks, tmp_path, "counts", 2)
    for stage in range(4):
        once, twice = (report[f"stage {stage}, depth 2, {n} forwards"] for n in (1, 2))
        deeper = report[f"stage {stage}, depth 4, 1 forwards"]
        assert deeper["collectives"] == once["collectives"]  # buckets, not one a parameter
        assert once.get("reads of the device", 0) <= 1  # one more reads loss and norm
        if stage < 2:
            assert once == twice  # nothing is exchanged, copied or read for a forward pass
            assert once["c10d::allreduce_"] == 2  # the gradients; the loss and the norm
        else:  # they keep a share of the gradients only
            assert twice["collectives"] - once["collectives"] == (1 if stage == 2 else 3)


@pytest.mark.slow
def test_zero_3_gathers_the_weights_of_a_block_at_once(ranks, tmp_path):
    report = _report(ranks, tmp_path, "gathers", 2)
    assert 0 < report["4"] - report["2"] <= 2 * 2  # two more blocks, forward and backward


@pytest.mark.parametrize(
    ("packs", "most", "sizes"),
    [
        (30, 16, [15, 15]),
        (15, 8, [5, 5, 5]),  # three equal passes rather than 7 and 8: one shape
        (7, 4, [3, 4]),  # but not seven
        (240, 16, [16] * 15),
        (1, 16, [1]),
        (3, 1, [1, 1, 1]),
        (4, 0, [1] * 4),
    ],
)
def test_packs_are_split_into_few_passes_of_equal_size(packs, most, sizes):
    groups = forward_groups(packs, most)
    assert [len(group) for group in groups] == sizes
    assert [index for group in groups for index in group] == list(range(packs))


def test_fewer_tokens_than_a_pack_are_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"tokens_per_forward is 100, less than one pack .*= 4096"):
        packs_per_forward(100, 4096)
    assert packs_per_forward(10000, 4096) == 2
    with pytest.raises(ValueError, match="it must be auto, or a whole number from 1 on"):
        TrainConfig(tokens_per_forward="lots")
    with pytest.raises(ValueError, match="it must be auto, or a whole number from 0 on"):
        TrainConfig(zero_stage="autp")


def _choose(memory, states=(30, 20, 15, 8), activations=2, joint=False, width=768, **train):
    need = Need(lambda stage: states[stage] * GIB, activations * GIB)
    shape = Shape(packs=30, token_budget=4096, width=width, joint=joint)
    chosen = choose_execution(TrainConfig(**train), need, shape, memory * GIB)
    return chosen.stage, chosen.packs


def test_the_lowest_stage_that_fits_is_taken_with_as_many_packs_as_have_use():
    assert _choose(141) == (0, 16)  # 65,536 tokens at 768 channels
    assert _choose(141, width=384) == (0, 30)  # a small model takes all packs of the step
    assert _choose(141, joint=True) == (0, 30)
    assert _choose(60) == (0, 10)  # 0.85 of it are 51
    assert _choose(60, zero_stage=2) == (2, 16)
    assert _choose(37) == (1, 5)
    assert _choose(60, zero_stage=0, tokens_per_forward=8192) == (0, 2)
    assert _choose(24) == (3, 6)  # 2 packs at stage 2: less than a quarter of 16
    on_cpu = {"states": (0, 0, 0, 0), "activations": 0}
    assert _choose(1, **on_cpu) == (0, 1)
    assert _choose(1, **on_cpu, width=16) == (0, 4)  # a very small model


def test_what_fits_into_the_whole_memory_alone_runs_with_as_few_packs_as_the_settings_allow():
    assert _choose(33, zero_stage=0) == (0, 1)  # 32 GiB: 0.85 of 33 are 28
    assert _choose(37, zero_stage=0) == (0, 1)  # as few as possible, not the 3 that would fit
    assert _choose(11) == (3, 1)  # 10 GiB at stage 3, at no other
    assert _choose(11, states=(9, 9, 9, 9)) == (0, 1)  # one rank: no stage needs less
    assert _choose(35, zero_stage=0, tokens_per_forward=8192) == (0, 2)  # 34 GiB
    assert _choose(13, tokens_per_forward=8192) == (3, 2)  # 12 GiB
    with pytest.raises(ValueError, match=r"rank is 31.0 GiB, and at ZeRO stage 0 it needs 32.0"):
        _choose(31, zero_stage=0)


def test_what_cannot_fit_is_refused_with_the_figures_and_the_settings_that_help():
    refused = r"memory of a rank is 24.0 GiB, and at ZeRO stage 0 it needs 32.0: 30.0 for weights"
    with pytest.raises(ValueError, match=refused) as error:
        _choose(24, zero_stage=0)
    for setting in ("zero_stage", "tokens_per_forward", "activation_checkpointing"):
        assert f"train.{setting}" in str(error.value)
    with pytest.raises(ValueError, match="at ZeRO stage 3 it needs"):
        _choose(5)
    with pytest.raises(ValueError, match="the activations of 30 packs"):
        _choose(40, zero_stage=0, tokens_per_forward=10**6)


@pytest.mark.parametrize(("rate", "draws"), [(0.0, False), (0.2, True)])
def test_packs_get_seeds_only_where_something_draws(rate, draws):
    engine = object.__new__(TrainEngine)
    engine._train = TrainConfig(tokens_per_forward=96)
    engine._draws = draws_at_random(tiny_navit(stochastic_depth=rate))
    assert engine._draws == draws
    packs = [lane_pack(0, lane) for lane in range(3)]
    groups = engine._joined(packs, [5, 6, 2**40 + 5])
    found = [pack for group, _ in groups for pack in group]
    assert [seed for _, seed in groups] == [5, 6, 2**40 + 5]
    if not draws:
        assert all(got is given for got, given in zip(found, packs, strict=True))
        return
    seeds = {pack.host_seeds for pack in found}
    assert len(seeds) == 3
    assert all(tuple(pack.draw_seeds.tolist()) == pack.host_seeds for pack in found)


def test_out_of_memory_names_the_settings_that_help_and_ends_the_run_for_good(monkeypatch):
    engine = object.__new__(TrainEngine)
    engine._train, engine.packs_per_rank = TrainConfig(zero_stage=1, tokens_per_forward=96), 1
    engine.device_clock, engine._highest_stage = DeviceClock(torch.device("cpu")), 3
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    monkeypatch.setattr(engine, "_gradients", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(
        RunError, match=r"zero_stage=1, train\.tokens_per_forward=96: CUDA .*GiB\."
    ) as told:
        engine.train_step([None], 1, [0], 1.0)
    for setting in ("zero_stage to", "tokens_per_forward to", "activation_checkpointing=true"):
        assert f"train.{setting}" in str(told.value)
