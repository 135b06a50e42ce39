"""Passes that are recorded and replayed: the bits of passes that are launched."""

import json
import logging
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.zeta.packs import with_seeds
from tests.zeta.train.recorded_jobs import DRAWS, Rerun
from tests.zeta.training import lane_pack, tiny_navit
from zeta import MegaVit
from zeta.exit_codes import RunError
from zeta.models.attention import launches_are_fixed
from zeta.objectives import build_objective
from zeta.objectives.config import ObjectiveConfig
from zeta.packed import join_packs
from zeta.train.config import TrainConfig
from zeta.train.graphs.choice import choose_graphs, graph_obstacle
from zeta.train.graphs.recorded import CudaRecorder, RecordedPasses

CUDA = torch.device("cuda")  # named, never used


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_replayed_passes_train_to_the_bits_of_launched_ones(ranks, tmp_path, world_size):
    out = tmp_path / "report.json"
    ranks.run("tests.zeta.train.recorded_jobs.recorded", world_size, {"out": str(out)})
    report = json.loads(out.read_text())
    assert len(report) == 12
    for case, found in report.items():
        replayed, plain, mixed = (found[name] for name in ("replay", "plain", "fails"))
        assert replayed.pop("replays") > 0, case
        assert plain.pop("replays") == 0
        mixed.pop("replays")
        assert replayed == mixed, case
        assert replayed == plain, case
        assert plain["losses"][0] != plain["losses"][1]


class Unsharded:
    """The parts of a sharded engine that recording uses, without ranks."""

    def __init__(self, model):
        self.module = model

    def forward_as(self, function, batch):
        return function(batch)


def _objective():
    return build_objective(ObjectiveConfig(label_smoothing=0.1), 5)


def _passes(recorder, required=False, **changes):
    engine = Unsharded(tiny_navit(**DRAWS, **changes))
    return engine, RecordedPasses(engine, _objective(), recorder, required=required)


def _pack(step, count=2, images=None):
    made = [lane_pack(step, lane, images) for lane in range(count)]
    packs = [with_seeds(pack, 100 * step + lane) for lane, pack in enumerate(made)]
    return join_packs(packs, "cpu")


def _gradients(engine, mean):
    engine.module.zero_grad()
    mean.backward()
    return [p.grad.clone() for p in engine.module.parameters()]


def _plain(engine, pack, factor):
    engine.module.zero_grad()
    loss = _objective().loss_sum(engine.module(pack), pack)
    (loss * factor).backward()
    return loss.detach(), [p.grad.clone() for p in engine.module.parameters()]


def test_one_recording_serves_packs_of_other_lengths_seeds_and_factors():
    recorder = Rerun()
    engine, passes = _passes(recorder)
    for step in range(5):
        pack, factor = _pack(step), 1 / (step + 3)
        mean, sums = passes.run(pack, factor)
        found = _gradients(engine, mean)
        loss, wanted = _plain(engine, pack, factor)
        assert torch.equal(sums["loss"], loss)
        assert all(map(torch.equal, found, wanted))
    assert recorder.records == 1
    assert recorder.replays == 4  # the first pass warms up


def test_images_that_are_mixed_otherwise_in_each_pack_are_replayed_too():
    recorder = Rerun()
    engine, passes = _passes(recorder)
    losses = []
    for step in range(4):
        pack = _pack(0, images=4)
        rows = len(pack.weights)
        shares = (torch.arange(rows) + 3 * step) % 7 / 7
        pack = replace(pack, mixed_with=torch.arange(rows).roll(step), own_shares=shares)
        mean, sums = passes.run(pack, 0.5)
        found = _gradients(engine, mean)
        loss, wanted = _plain(engine, pack, 0.5)
        assert torch.equal(sums["loss"], loss)
        assert sums["top1"] == _objective().counts(engine.module(pack), pack)["top1"]
        assert all(map(torch.equal, found, wanted))
        losses.append(loss.item())
    assert (recorder.records, recorder.replays) == (1, 3)
    assert len(set(losses)) == 4


def test_gradients_of_several_replays_add_up_and_are_not_overwritten():
    engine, passes = _passes(Rerun())
    packs = [_pack(step) for step in range(4)]
    for pack in packs:
        passes.run(pack, 0.5)[0].backward()
    added = [p.grad.clone() for p in engine.module.parameters()]
    wanted = [torch.zeros_like(gradient) for gradient in added]
    for pack in packs:
        for total, gradient in zip(wanted, _plain(engine, pack, 0.5)[1], strict=True):
            total += gradient
    for got, expected in zip(added, wanted, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_longer_image_raises_the_bound_and_other_shapes_are_recorded_for_themselves():
    recorder = Rerun()
    _, passes = _passes(recorder)
    full = [_pack(step, images=4) for step in range(60)]  # their padding is the longest segment
    short = [pack for pack in full if max(pack.lengths) <= 64]
    for pack in short[:3]:
        passes.run(pack, 1.0)
    assert (recorder.records, recorder.replays) == (1, 2)
    longer = next(pack for pack in full if max(pack.lengths) > 64)
    for _ in range(2):
        passes.run(longer, 1.0)
    assert (recorder.records, recorder.replays) == (2, 3)
    passes.run(short[0], 1.0)
    assert (recorder.records, recorder.replays) == (2, 4)
    for _ in range(2):
        passes.run(_pack(1, count=1), 1.0)
    assert (recorder.records, recorder.replays) == (3, 5)


def test_an_empty_pack_is_launched_and_raises_no_bound():
    """It is one long tail, and as rare as the end of a run."""
    recorder = Rerun()
    engine, passes = _passes(recorder)
    empty = join_packs([with_seeds(lane_pack(0, 0, images=0), 7)] * 2, "cpu")
    for pack in (empty, _pack(0), empty, _pack(0), empty):
        mean, sums = passes.run(pack, 1.0)
        loss, wanted = _plain(engine, pack, 1.0)
        assert torch.equal(sums["loss"], loss)
        assert all(map(torch.equal, _gradients(engine, mean), wanted))
    assert (recorder.records, recorder.replays) == (1, 1)


@pytest.fixture
def pools(monkeypatch):
    """Stands for torch's CUDA graphs: returns the pools that recordings asked for, in order.

    As torch's allocator, it refuses the pool of graphs that are gone: memory of it may be in use.
    """
    users, asked = {}, []

    class Graph:
        def __init__(self):
            self.name = None

        def pool(self):
            return self.name

        def replay(self):
            pass

        def __del__(self):
            if self.name is not None:
                users[self.name] -= 1

    @contextmanager
    def graph(graph, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"
        assert pool is None or users[pool] > 0, "use_count > 0 INTERNAL ASSERT FAILED"
        asked.append(pool)
        graph.name = pool or f"pool {len(asked)}"
        users[graph.name] = users.get(graph.name, 0) + 1
        yield

    @contextmanager
    def stream(given):
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    return asked


def test_a_recording_shares_the_memory_of_living_graphs_and_never_of_those_that_are_gone(pools):
    recorder = CudaRecorder()
    _, first = recorder.record(lambda: None)
    _, second = recorder.record(lambda: None)
    del first
    _, third = recorder.record(lambda: None)
    del second, third
    recorder.record(lambda: None)
    assert pools == [None, "pool 1", "pool 1", None]


def test_a_bound_that_rises_after_the_first_recording_is_recorded_again(pools):
    _, passes = _passes(CudaRecorder(), required=True)
    full = [_pack(step, images=4) for step in range(60)]  # their padding is the longest segment
    short = next(pack for pack in full if max(pack.lengths) <= 64)
    longer = next(pack for pack in full if max(pack.lengths) > 64)
    for pack in (short, short, longer, longer):
        passes.run(pack, 1.0)
    assert pools == [None, None]


def test_weights_that_move_in_memory_are_recorded_anew():
    recorder = Rerun()
    engine, passes = _passes(recorder)
    for _ in range(2):
        passes.run(_pack(0), 1.0)
    for parameter in engine.module.parameters():
        parameter.data = parameter.data.clone() * 2
    _, sums = passes.run(_pack(0), 1.0)
    assert torch.equal(sums["loss"], _plain(engine, _pack(0), 1.0)[0])
    passes.run(_pack(0), 1.0)
    assert recorder.records == 2


def test_a_recording_that_fails_is_said_once_and_the_passes_go_on_with_the_same_numbers(caplog):
    engine, passes = _passes(Rerun(fails=True))
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            mean, sums = passes.run(_pack(step), 0.25)
            loss, wanted = _plain(engine, _pack(step), 0.25)
            assert torch.equal(sums["loss"], loss)
            assert all(map(torch.equal, _gradients(engine, mean), wanted))
    (record,) = caplog.records
    assert record.message == (
        "passes run without CUDA graphs, as one cannot be recorded: "
        "operation not permitted when stream is capturing"
    )


def test_a_recording_that_was_asked_for_and_fails_ends_the_run_with_the_fix():
    _, passes = _passes(Rerun(fails=True), required=True)
    passes.run(_pack(0), 1.0)
    with pytest.raises(RunError, match=r"train\.cuda_graph is true, .* set train\.cuda_graph to"):
        passes.run(_pack(0), 1.0)


def test_parameters_without_a_part_in_the_loss_get_no_gradient():
    engine = Unsharded(tiny_navit())
    engine.module.unused = nn.Parameter(torch.zeros(3))
    passes = RecordedPasses(engine, _objective(), Rerun())
    for step in range(2):
        passes.run(_pack(step), 1.0)[0].backward()
    assert engine.module.unused.grad is None
    assert engine.module.head.weight.grad is not None


def test_blocks_that_are_recomputed_are_recorded_too():
    engine, passes = _passes(Rerun())
    engine.module.activation_checkpointing = True
    for step in range(3):
        found = _gradients(engine, passes.run(_pack(step), 0.5)[0])
        assert all(map(torch.equal, found, _plain(engine, _pack(step), 0.5)[1]))


def _choose(mode="auto", model=None, objective=None, device=CUDA, **train):
    given = {"zero_stage": 1, "tokens_per_forward": 4096, "dtype": "bf16"} | train
    settings = TrainConfig(cuda_graph=mode, **given)
    return choose_graphs(settings, model or tiny_navit(), objective or _objective(), device)


def test_auto_records_where_the_host_binds_as_measured():
    def of(depth, dim, tokens):
        with torch.device("meta"):
            sizes = {"dim": dim, "mlp_dim": 4 * dim, "heads": dim // 64, "depth": depth}
            model = tiny_navit(**sizes, dim_head=64)
        return _choose(model=model, tokens_per_forward=tokens).use

    assert of(12, 768, 4096)
    assert of(12, 768, 16_384)
    assert of(12, 768, 65_536)  # beside the workers of a loader
    assert of(12, 384, 65_536)
    assert not of(12, 1408, 65_536)
    assert of(24, 1024, 32_768)


class Foreign(nn.Module):
    pass


class ForeignObjective(type(_objective())):
    pass


class Whole(type(_objective())):
    whole_images = True


class Prepared(type(_objective())):
    def begin_step(self, step):
        self.temperature = step.share


OBSTACLES = [
    ({"device": torch.device("cpu")}, "the device is a cpu"),
    ({"zero_stage": 3}, "at ZeRO stage 3"),
    ({"model": tiny_navit(registers=2)}, "class tokens and registers"),
    ({"model": MegaVit(8, 4, 3, 16, 1, 2, 32)}, "class tokens and registers"),
    ({"model": Foreign()}, "Foreign is not an image encoder of zeta"),
    ({"attention": "dense"}, "train.attention=dense at train.dtype=bf16 depend on the lengths"),
    ({"dtype": "fp32"}, "train.attention=auto at train.dtype=fp32 depend on the lengths"),
    ({"objective": Whole(ObjectiveConfig(), 5)}, "another number of dropped patches"),
    ({"objective": Prepared(ObjectiveConfig(), 5)}, "prepares numbers for each step"),
    ({"objective": object()}, "object compares the images of all passes"),
]


@pytest.mark.parametrize(("case", "reason"), OBSTACLES)
def test_what_cannot_be_recorded_is_left_alone_by_auto_and_refused_where_asked_for(case, reason):
    found = _choose(**case)
    assert not found.use
    assert reason in found.reason
    with pytest.raises(ValueError, match=r"train\.cuda_graph is true.*set train\.cuda_graph to"):
        _choose("true", **case)
    assert not _choose("false", **case).use


def test_an_objective_from_elsewhere_is_recorded_only_where_asked_for():
    own = ForeignObjective(ObjectiveConfig(), 5)
    assert "ForeignObjective is not an objective of zeta" in _choose(objective=own).reason
    assert _choose("true", objective=own).use


def test_an_attention_with_launches_by_length_is_told_from_those_with_fixed_ones():
    for name in ("auto", "varlen", "varlen_fa2", "varlen_cudnn", "flex"):
        assert launches_are_fixed(name, CUDA, torch.bfloat16, 64), name
    for name in ("dense", "sdpa_segments"):
        assert not launches_are_fixed(name, CUDA, torch.bfloat16, 64), name
    assert not launches_are_fixed("auto", CUDA, torch.bfloat16, 66)


def test_yaml_booleans_are_taken_and_other_words_refused():
    assert TrainConfig(cuda_graph=True).cuda_graph == "true"
    with pytest.raises(ValueError, match=r"train\.cuda_graph"):
        TrainConfig(cuda_graph="yes")


def test_the_obstacle_names_the_first_setting_that_stands_in_the_way():
    train = TrainConfig(cuda_graph="true", zero_stage=3)
    assert "train.zero_stage" in graph_obstacle(train, tiny_navit(), _objective(), CUDA)
