"""`zeta train --dry-run` checks all of a start, trains on one pack and leaves nothing behind."""

from __future__ import annotations

import pytest

from launch.cli import entry_point
from launch.config.load import load_config
from launch.run.dry_run import memory_table
from launch.run.execution import RunMemory, may_record
from tests.launch.run.test_checks import _shards
from tests.launch.run.test_foreign_objective import KIND
from tests.zeta.foreign_objective import Brightness
from zeta.exit_codes import ExitCode
from zeta.objectives.base import Step
from zeta.random_state import derive_seed
from zeta.train.config import TrainConfig
from zeta.train.hardware import accelerator
from zeta.train.memory_model import ActivationMemory


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return _shards(tmp_path_factory.mktemp("shards"), 24)


def _dry(shards, run_dir, *words):
    settings = [f"data.shards={shards}", f"run.dir={run_dir}"]
    return entry_point(["train", "demo", *settings, "--dry-run", *words])


@pytest.mark.slow
def test_a_dry_run_says_what_the_run_would_take(shards, tmp_path, capfd):
    words = ("--gpu", "h100", "--world-size", "2", "data.token_budget=256", "train.max_steps=500")
    assert _dry(shards, tmp_path / "run", *words, "optim.warmup_steps=10") == 0
    said = capfd.readouterr().out
    assert "token_budget: 256" in said  # the resolved config
    assert "steps             500" in said
    assert "parameters        2" in said
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.strip()}
    for kind in ("weights", "gradients", "optimizer", "activations", "gathered", "total"):
        assert len(rows[kind]) == 4
    assert rows["fits"] == ["h100", "yes", "yes", "yes", "yes"]
    told = said.index("all checks have passed; training on one pack")
    assert said.index("fits h100") < told  # all figures, then what may take minutes
    assert told < said.index("forward, backward and update on cpu: loss")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_dry_run_calls_the_hooks_of_the_objective_as_the_first_step_of_a_run_does(
    shards, tmp_path, monkeypatch
):
    told = []
    for hook in ("start", "begin_step", "finish_step"):
        monkeypatch.setattr(
            Brightness, hook, lambda _, *given, name=hook: told.append((name, given[-1]))
        )
    words = (f"objective.kind={KIND}", "data.token_budget=256", "objective.label_smoothing=0")
    assert _dry(shards, tmp_path / "run", *words, "train.device=cpu") == 0
    step = Step(0, derive_seed(load_config("demo", ["data.shards=x"]).train.seed, 0), share=0.0)
    assert [name for name, _ in told] == ["start", "begin_step", "finish_step"]
    assert [given for _, given in told[1:]] == [step, step]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world-size", "3"], "3 ranks but train.packs_per_step is 2"),
        (["data.token_budget=3"], "data.token_budget is 3"),
        (["--gpu", "tpu"], "--gpu is 'tpu'; choose one of"),
        (
            ["optim.kind=muon", "train.zero_stage=2"],
            "optim.kind is muon, which needs the matrices whole, but train.zero_stage=2 asks",
        ),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(shards, tmp_path, capfd, words, message):
    assert _dry(shards, tmp_path, *words) == ExitCode.NEVER_RESTART
    assert message in capfd.readouterr().err


def test_options_of_a_dry_run_are_refused_without_it(shards, tmp_path, capfd):
    words = ["train", "demo", f"data.shards={shards}", f"run.dir={tmp_path}", "--gpu", "h100"]
    assert entry_point(words) == ExitCode.NEVER_RESTART
    assert "--gpu and --world-size need --dry-run" in capfd.readouterr().err


def _memory(sizes, *, recorded=False):
    return RunMemory(sizes, [], 2, ActivationMemory(0, 2**30), recorded=recorded)


def test_recorded_passes_hold_the_gradients_twice_more_where_they_are_possible():
    for recorded, wanted in ((False, 0), (True, 2 * 4 * 2**30)):
        lines = memory_table(_memory([2**30], recorded=recorded), TrainConfig(), 2, None)
        (row,) = (line.split()[1:] for line in lines if line.startswith("recorded"))
        assert row == [f"{wanted / 2**30:.3f}"] * 3 + ["0.000"]


def test_a_model_that_is_too_large_is_said_not_to_fit():
    lines = memory_table(_memory([100_000_000] * 100), TrainConfig(), 64, accelerator("h100"))
    assert lines[-3].split() == ["fits", "h100", "NO", "NO", "yes", "yes"]


def test_the_table_of_memory_has_the_stages_that_the_optimizer_can_take():
    for highest, missing in ((0, "ZeRO 1"), (3, "ZeRO 4")):
        lines = memory_table(_memory([1000]), TrainConfig(), 2, None, highest)
        assert "ZeRO 0*" in lines[0]
        assert f"ZeRO {highest}" in lines[0]
        assert missing not in lines[0]


def test_what_is_offloaded_to_the_host_takes_no_memory_of_the_gpu():
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    train = TrainConfig(deepspeed=offload, ema_decay=0.99)
    lines = memory_table(_memory([100_000_000] * 100), train, 2, accelerator("h100"))
    rows = {line.rsplit(maxsplit=4)[0]: line.split()[-4:] for line in lines}
    assert rows["fits h100"] == ["NO", "NO", "yes", "yes"]
    assert float(rows["(on the host)"][2]) == pytest.approx(100e9 / 2**30, abs=1e-3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["navit_b16_classification"], True),
        (["navit_b16_classification", "train.device=cpu"], False),
        (["navit_b16_classification", "train.cuda_graph=false"], False),
        (["megavit_1b"], False),  # class tokens
    ],
)
def test_the_memory_of_recorded_passes_counts_where_a_gpu_may_record_them(words, expected):
    name, *changes = words
    config = load_config(name, ["data.shards=x", "run.dir=y", "model.num_classes=10", *changes])
    assert may_record(config) is expected
