"""The rank that others wait for is found, by its own time before the gradients are exchanged."""

import json
import socket

import pytest
import torch

from tests.zeta.training import lane_pack, tiny_navit
from zeta.run.directory import RunDir
from zeta.train.device_clock import Stopwatch
from zeta.train.straggler import Balance, RankLoad, straggler

JOB = "tests.zeta.trainer_jobs.train"


def test_the_ratio_is_the_slowest_over_the_mean():
    loads = [RankLoad("a", 0.0, 1.0), RankLoad("b", 0.5, 1.5), RankLoad("c", 1.0, 0.0)]
    assert straggler(loads) == (1, pytest.approx(2.0 / (4.0 / 3)))
    assert straggler([RankLoad("a", 0.0, 0.0)]) == (0, 1.0)


def test_a_load_is_the_mean_of_the_steps_since_the_last_one():
    balance = Balance(notify=lambda text: None, host="here")
    balance.add(0.1, 1.0)
    balance.add(0.3, 2.0)
    assert balance.take(peak_gib=3.0) == RankLoad("here", pytest.approx(0.2), 1.5, 3.0)
    assert balance.take(peak_gib=3.0) == RankLoad("here", 0.0, 0.0, 3.0)


def test_a_much_slower_rank_is_named_once_until_it_is_not_the_slowest_any_more():
    said = []
    balance = Balance(said.append)
    even = [RankLoad("a", 0.0, 1.0), RankLoad("b", 0.0, 1.0)]
    uneven = [RankLoad("a", 0.0, 1.0), RankLoad("b", 0.5, 2.0)]
    for loads in (even, uneven, uneven, uneven, even, uneven, uneven):
        metrics = balance.metrics(loads)
    assert len(said) == 2
    assert "rank 1 on b is the slowest: 1.43 times the mean" in said[0]
    assert metrics["balance/slowest_host"] == "b"
    assert metrics["balance/slowest_rank"] == 1


def test_ranks_that_are_slow_in_turn_are_not_named():
    said = []
    balance = Balance(said.append)
    first = [RankLoad("a", 0.0, 2.0), RankLoad("a", 0.0, 1.0)]
    second = [RankLoad("a", 0.0, 1.0), RankLoad("a", 0.0, 2.0)]
    for loads in (first, second) * 3:
        balance.metrics(loads)
    assert said == []


def test_the_clock_counts_what_it_is_entered_for():
    clock = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with clock.running():
            torch.ones(300, 300) @ torch.ones(300, 300)
    seconds, parts = clock.take()
    assert 0 < seconds < 1
    assert parts == 2
    assert clock.take() == (0, 0)


def _train(ranks, run_dir, world_size, **changes):
    options = {"packs_per_step": 4, "max_steps": 4, "log_every": 2, "dtype": "fp32"}
    run = {"run_dir": str(run_dir), "train": options | changes.pop("train", {}), **changes}
    ranks.run(JOB, world_size, run)
    return [json.loads(line) for line in RunDir(run_dir).metrics.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["data", "forward"])
def test_a_slow_rank_shows_in_the_metrics_with_its_host(ranks, tmp_path, where):
    slow = {"rank": 1, "where": where, "seconds": 0.3}
    lines = _train(ranks, tmp_path / "run", 2, accidents={"slow": slow})
    log = RunDir(tmp_path / "run").rank_log(0).read_text()
    last = [line for line in lines if "balance/straggler_ratio" in line][-1]
    assert 1.6 < last["balance/straggler_ratio"] <= 2.0
    assert last["balance/slowest_rank"] == 1
    assert last["balance/slowest_host"] == socket.gethostname()
    assert f"rank 1 on {socket.gethostname()} is the slowest" in log


@pytest.mark.slow
def test_utilisation_counts_the_images_of_all_ranks(ranks, tmp_path):
    """Two ranks of 1 TFLOP/s each: flops of the packs of both / (step time x 2e12)."""
    train = {"log_every": 1, "peak_tflops": 1.0}
    lines = _train(ranks, tmp_path / "known", 2, train=train)
    model = tiny_navit()
    for line in lines[:4]:
        packs = [lane_pack(line["step"] - 1, lane) for lane in range(4)]
        flops = sum(model.training_flops(pack) for pack in packs)
        expected = flops / line["time/step_s"] / 2e12
        assert line["throughput/mfu"] == pytest.approx(expected, rel=1e-6)
    unknown = _train(ranks, tmp_path / "unknown", 1)
    assert not [line for line in unknown if "throughput/mfu" in line]
