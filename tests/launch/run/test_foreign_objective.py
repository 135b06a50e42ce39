"""An objective from outside of zeta trains from a recipe, on shards without labels."""

import json

import pytest

from data_pipeline.shards.build import build_shards
from launch.config.load import load_config
from launch.recipes.digits import render_split
from tests.launch.command_line import zeta
from tests.zeta.foreign_objective import Brightness
from zeta.models.config import load_pretrained
from zeta.models.exported import read_config
from zeta.objectives import OBJECTIVES, build_objective
from zeta.objectives.config import ObjectiveConfig

KIND = "tests.zeta.foreign_objective:Brightness"
SETTINGS = (
    f"objective.kind={KIND}",
    "train.max_steps=30",
    "optim.warmup_steps=3",
    "train.checkpoint_every=30",
    "train.log_every=10",
    "train.evaluate.every=30",
    "data.workers=0",
    "tracker.wandb.mode=disabled",
)


@pytest.mark.slow
def test_an_objective_of_ones_own_trains_without_labels_evaluates_and_exports(tmp_path):
    samples = [(k, {"jpg": f["jpg"]}) for k, f in list(render_split("val", seed=0))[:60]]
    build_shards(samples, tmp_path / "shards")
    settings = ("data.shards=shards", "data.val_shards=shards", "run.dir=run", *SETTINGS)
    done = zeta("train", "demo", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    (scores,) = (line for line in lines if "val/loss" in line)
    assert losses[-1] < losses[0]
    assert scores["val/loss"] >= 0
    assert not any(name.startswith("val/best") for name in scores)
    exported = zeta("export", "run", "export", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert load_pretrained(tmp_path / "export").head.out_features == 1
    info = read_config(tmp_path / "export")["info"]
    assert (info["objective"], info["targets"]) == (KIND, "none")
    refused = zeta("eval", "export", "shards", cwd=tmp_path)
    assert refused.returncode == 1
    assert "was not trained on classes: give --knn or --probe" in refused.stderr


def test_an_objective_is_found_in_the_table_or_by_its_module(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "brightness", Brightness)
    for kind in ("brightness", KIND):
        assert type(build_objective(ObjectiveConfig(kind), 1)) is Brightness


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "softmacks",
            "kind is 'softmacks'; choose one of clip, clip+distill, distill, lejepa, siglip, "
            "siglip+distill, sigmoid, sigmoid+distill, softmax, softmax+distill",
        ),
        ("nowhere.at_all:Loss", "cannot be imported (No module named 'nowhere')"),
        ("tests.zeta.foreign_objective:Darkness", "cannot be imported"),
        ("tests.zeta.foreign_objective:NotAnObjective", "is not a class derived from"),
    ],
)
def test_what_is_not_an_objective_is_refused_by_name(kind, message):
    with pytest.raises(ValueError, match=r"objective\.kind") as refused:
        load_config("demo", ["data.shards=unused", f"objective.kind={kind}"])
    assert message in str(refused.value)
