"""Frozen parts of a model: which they are, that they stay, and that a run goes on with them."""

import json

import pytest
import torch

from tests.zeta.training import tiny_navit
from zeta import MegaVit
from zeta.checkpoint.directory import load_full_weights
from zeta.export.saving import save_pretrained
from zeta.models.text_tower import TextTower
from zeta.models.trainable import freeze, frozen_names
from zeta.train.config import TrainConfig

JOB = "tests.zeta.trainer_jobs.train"


def _first_parts(model):
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    return {name if "blocks" not in name else name[:8] for name in learning}


@pytest.mark.parametrize("arch", ["navit", "megavit"])
def test_head_and_last_k_learn_and_all_before_them_is_frozen(arch):
    def build():
        if arch == "navit":
            return tiny_navit(depth=3)
        return MegaVit(16, 4, num_classes=5, dim=16, depth=3, heads=2, mlp_dim=32, dim_head=8)

    names = [name for name, _ in build().named_parameters()]
    expected = {
        "all": ("",),
        "head": ("head.",),
        "last-1": ("blocks.2.", "norm.", "attn_pool.", "head."),
        "last-3": ("blocks.", "norm.", "attn_pool.", "head."),
    }
    for trainable, learning in expected.items():
        model = build()
        freeze(model, trainable)
        assert frozen_names(model) == [n for n in names if not n.startswith(learning)], trainable


@pytest.mark.parametrize("value", ["tail", "last-0", "last-", "last--1", "last-1.5", "", "HEAD"])
def test_an_unknown_choice_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"train.trainable is .*; choose all, head, or last-K"):
        TrainConfig(trainable=value)


def test_more_blocks_than_there_are_or_a_model_of_two_towers_is_refused():
    with pytest.raises(ValueError, match="is last-3, but the model has 2 blocks: set it to last-2"):
        freeze(tiny_navit(), "last-3")
    towers = torch.nn.ModuleDict({"image": tiny_navit(), "text": TextTower(9, 4, 16, 1, 2, 16, 4)})
    with pytest.raises(ValueError, match=r"train.trainable is head, which is for classification"):
        freeze(towers, "head")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_frozen_parts_and_layer_decay_equal_a_plain_loop_on_every_stage(
    ranks, tmp_path, world_size
):
    out = tmp_path / "report.json"
    ranks.run("tests.zeta.engine_jobs.fine_tuning", world_size, {"out": str(out)})
    report = json.loads(out.read_text())
    assert len(report) == 12
    sizes = {name: p.numel() for name, p in tiny_navit().named_parameters()}
    for case, seen in report.items():
        assert seen["loss error"] < 1e-5, case
        assert seen["weight error"] < 1e-5, case
        trainable = case.partition(",")[0]
        model = tiny_navit()
        freeze(model, trainable)
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        assert set(seen["changed"]) == learning, case
        total = sum(sizes[name] for name in learning)
        # At stage 0 every rank has all; at 1 to 3 rank 0 has about its share.
        most = total if world_size == 1 or case.endswith("0") else 0.8 * total
        assert 0 < seen["optimizer elements"] <= most, case


def _run(run_dir, steps, stage, seed, **train):
    options = {"packs_per_step": 2, "max_steps": steps, "zero_stage": stage, "dtype": "fp32"}
    options |= {"checkpoint_every": None, "ema_decay": 0.5, "log_every": 1, "seed": seed} | train
    optim = {"lr": 1e-2, "schedule": "constant", "layer_decay": 0.5}
    return {"run_dir": str(run_dir), "train": options, "optim": optim, "model": {"seed": seed}}


@pytest.mark.slow
def test_a_partly_frozen_run_resumes_on_another_stage_and_world_and_exports_whole(ranks, tmp_path):
    arguments = {"arch": "navit", "image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 16}
    arguments |= {"depth": 2, "heads": 2, "dim_head": 8, "mlp_dim": 32, "channels": 1}
    began_at = tiny_navit(seed=3).state_dict()
    save_pretrained(tmp_path / "export", began_at, arguments, {})
    begin = {"init_from": str(tmp_path / "export"), "new_head": True, "trainable": "last-1"}
    through = tmp_path / "through"
    ranks.run(JOB, 2, _run(through, 4, 2, seed=0, **begin))
    expected = load_full_weights(through / "checkpoints/step_00000004")
    frozen_part = ("embeds.", "blocks.0.")
    for name, value in expected.items():
        if name in ("mean", "std"):
            continue
        assert torch.equal(value, began_at[name]) == name.startswith(frozen_part), name
    fresh = tiny_navit(seed=0).state_dict()
    for stages in ((2, 2), (0, 3), (3, 1), (1, 0)):
        run_dir = tmp_path / f"from {stages[0]} to {stages[1]}"
        outputs = ranks.run(JOB, 2, _run(run_dir, 2, stages[0], seed=0, **begin))
        assert "except that head.weight and head.bias begin at zero (train.new_head)" in outputs[0]
        # What is gone cannot be read again, and other initial weights must not be seen.
        again = begin | {"init_from": str(tmp_path / "gone")}
        world_size = 2 if stages == (2, 2) else 1
        ranks.run(
            JOB, world_size, _run(run_dir, 4, stages[1], seed=0, **again) | {"model": {"seed": 8}}
        )
        for average in (False, True):
            ours = load_full_weights(run_dir / "checkpoints/step_00000004", average=average)
            theirs = load_full_weights(through / "checkpoints/step_00000004", average=average)
            assert set(ours) == set(theirs) == set(fresh)
            for name, value in theirs.items():
                same = torch.equal if stages == (2, 2) else torch.allclose
                tolerance = {} if stages == (2, 2) else {"atol": 1e-4}
                assert same(ours[name], value, **tolerance), (stages, name)
