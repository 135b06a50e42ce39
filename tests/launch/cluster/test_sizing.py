from __future__ import annotations

import pytest
import torch

from launch.cluster.sizing import BUDGETS, Sizing, sizing_table, uniform_pack
from tests.launch.command_line import zeta
from zeta.models.config import ModelConfig, build_model
from zeta.models.presets import PRESETS
from zeta.train.config import OptimConfig, TrainConfig
from zeta.train.hardware import RESERVE_GIB, Accelerator, accelerator
from zeta.train.memory_model import activation_memory, state_memory

pytestmark = pytest.mark.slow


def _measured(preset: str, images: int) -> tuple[int, int]:
    with torch.device("meta"):
        model = build_model(ModelConfig(preset=preset, num_classes=1000))
    pack = uniform_pack(images, PRESETS[preset])
    memory = activation_memory(model, pack, lambda out, _: out.float().square().sum(), "bf16")
    return len(pack.patches), memory.peak


def test_activations_between_the_counted_packs_and_beyond_lie_on_the_line():
    tokens, peak = _measured("navit_ti16", 24)
    assert tokens == 24 * 256
    assert Sizing("navit_ti16").activations(tokens) == pytest.approx(peak, rel=0.01)


def _gpu(gib: float) -> Accelerator:
    return Accelerator("imagined", "^$", gib, 1.0, 1.0)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_largest_budget_is_the_last_that_fits(stage):
    sizing = Sizing("navit_ti16")
    train = TrainConfig(zero_stage=stage, dtype="bf16")
    states = state_memory(sizing.weights, train, 8).total
    for budget in (BUDGETS[0], 8192, BUDGETS[-1]):
        needed = (states + sizing.activations(budget)) / 2**30 + RESERVE_GIB
        assert sizing.largest_budget(_gpu(needed * 1.0001), stage, 8) == budget
    too_small = (states + sizing.activations(BUDGETS[0])) / 2**30 + RESERVE_GIB
    assert sizing.largest_budget(_gpu(too_small * 0.9999), stage, 8) is None


def test_a_class_token_is_counted_and_a_pack_is_full():
    pack = uniform_pack(3, PRESETS["megavit_1b"])
    assert len(pack.patches) == pack.num_tokens == 3 * 257
    assert pack.patches.shape[1] == 14 * 14 * 3
    assert (pack.coords[0] == -1).all()
    assert pack.coords[256].tolist() == [15, 15]


def test_the_table_has_a_row_for_each_stage_and_recomputing_saves_memory():
    gpu = _gpu(8.0)
    head, _, *rows = sizing_table(["navit_ti16"], [gpu, accelerator("h100")], 8)
    assert head.count("|") == 6
    assert [row.split("|")[3].strip() for row in rows] == ["2", "3"]
    plain, sparing = (
        Sizing("navit_ti16", checkpointing=each).activations(65536) for each in (False, True)
    )
    assert sparing < 0.5 * plain


def test_the_optimizer_decides_what_is_kept_of_a_weight_and_at_which_stages():
    gpu = _gpu(64.0)
    stages = {
        kind: [row.split("|")[3].strip() for row in list(sizing_table(
            ["navit_ti16"], [gpu], 8, OptimConfig(kind=kind)))[2:]]
        for kind in ("adamw", "muon")
    }  # fmt: skip
    assert stages == {"adamw": ["2", "3"], "muon": ["0"]}
    ours, of_sgd = Sizing("navit_ti16"), Sizing("navit_ti16", optim=OptimConfig(kind="sgd"))
    train = TrainConfig(zero_stage=2, dtype="bf16")
    states = state_memory(ours.weights, train, 1, moments=0).total
    room = (states + ours.activations(BUDGETS[0])) / 2**30 + RESERVE_GIB
    assert of_sgd.largest_budget(_gpu(room * 1.0001), 2, 1) == BUDGETS[0]
    assert ours.largest_budget(_gpu(room * 1.0001), 2, 1) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("navit_b17",), "navit_b16"),
        (("navit_b16", "--gpus", "h1000"), "--gpu is 'h1000'"),
        (("navit_b16", "--optim", "moun"), "optim.kind is 'moun'"),
    ],
)
def test_a_wrong_name_is_one_message(tmp_path, arguments, words):
    done = zeta("launch", "sizes", *arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr
