"""A run without labels says how well its embeddings classify, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.shards.build import build_shards
from launch.recipes.digits import CLASS_NAMES, render_split
from launch.report.chart_specs import validation_charts
from launch.report.logged_run import read_run
from tests.launch.command_line import zeta
from zeta.run.directory import RunDir

SETTINGS = (
    *("objective.kind=lejepa", "objective.label_smoothing=0", "objective.lejepa.hidden=64"),
    *("data.views=2", "data.shards=shards/bare", "data.workers=0"),
    *("data.probe_shards=shards/train", "data.probe_val_shards=shards/val"),
    *("train.evaluate.knn=true", "train.evaluate.probe=true", "train.evaluate.every=2"),
    *("train.max_steps=3", "optim.warmup_steps=1", "train.checkpoint_every=3"),
    *("train.device=cpu", "train.dtype=fp32", "tracker.wandb.mode=disabled"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with digits: without classes, 100 with and 61 held out, one of which is broken."""
    folder = tmp_path_factory.mktemp("probing")
    train = [sample for sample, _ in zip(render_split("train", seed=0), range(200), strict=False)]
    bare = [(key, {"jpg": files["jpg"]}) for key, files in train[:100]]
    val = [sample for sample, _ in zip(render_split("val", seed=0), range(61), strict=False)]
    val[3] = (val[3][0], val[3][1] | {"jpg": val[3][1]["jpg"][:-200]})
    build_shards(bare, folder / "shards/bare")
    build_shards(train[100:], folder / "shards/train", max_count=40, class_names=CLASS_NAMES)
    build_shards(val, folder / "shards/val", max_count=40, class_names=CLASS_NAMES)
    done = zeta("train", "demo", "run.dir=run", *SETTINGS, "train.ema_decay=0.5", cwd=folder)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


def probed(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val/knn_top1" in line]


@pytest.mark.slow
def test_scores_are_logged_when_due_and_at_the_end_without_other_held_out_images(world: Path):
    lines = probed(world / "run")
    assert [line["step"] for line in lines] == [2, 3]
    for line in lines:
        assert {name for name in line if name.startswith("val/")} == {
            f"val/{name}{of}"
            for name in ("knn_top1", "probe_top1", "embedding_rank", "embedding_deviation")
            for of in ("", "_of_average")
        }
        assert 1 < line["val/embedding_rank"] < 64
        assert 0.1 < line["val/probe_top1"] <= 1
    log = RunDir(world / "run").rank_log(0).read_text()
    assert (
        "k-NN and linear probe learn from 100 images of data.probe_shards and classify 61 of "
        "data.probe_val_shards every 2 steps"
    ) in log
    assert log.count("1 images of the probes could not be used, the last was") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("ema", "suffix"), [((), ""), (("--ema",), "_of_average")])
def test_the_scores_are_those_of_zeta_eval_on_the_export(world: Path, ema, suffix):
    name = f"export{suffix}"
    exported = zeta("export", "run", name, *ema, cwd=world)
    assert exported.returncode == 0, exported.stderr
    parts = ("--knn", "shards/train", "--probe", "shards/train", "--json")
    evaluated = zeta("eval", name, "shards/val", *parts, cwd=world)
    assert evaluated.returncode == 0, evaluated.stderr
    result, line = json.loads(evaluated.stdout), probed(world / "run")[-1]
    assert result["knn"]["images"] == 60
    assert line[f"val/knn_top1{suffix}"] == pytest.approx(result["knn"]["top1"], abs=0.5 / 60)
    score = result["linear_probe"]["top1"]
    assert line[f"val/probe_top1{suffix}"] == pytest.approx(score, abs=0.5 / 60)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_find_the_scores_of_one(world: Path, stage):
    run = f"two{stage}"
    words = ("launch", "local", "demo", f"run.dir={run}", *SETTINGS, "train.ema_decay=0.5")
    done = zeta(*words, f"train.zero_stage={stage}", "--nproc=2", cwd=world)
    assert done.returncode == 0, done.stderr + done.stdout
    for one, two in zip(probed(world / "run"), probed(world / run), strict=True):
        for name in (name for name in one if "_top1" in name):
            assert two[name] == pytest.approx(one[name], abs=1.5 / 60), name


@pytest.mark.slow
def test_the_report_draws_both_scores_in_one_chart_and_the_spread_in_two(world: Path):
    chart, rank, deviation = validation_charts(read_run(world / "run"))
    assert chart.title == "Validation top-1 by embeddings"
    assert chart.curves == (
        ("k-NN", "val/knn_top1"),
        ("k-NN, average of the weights", "val/knn_top1_of_average"),
        ("linear probe", "val/probe_top1"),
        ("linear probe, average of the weights", "val/probe_top1_of_average"),
    )
    assert rank.title == "Effective rank of the embeddings"
    assert [metric for _, metric in rank.curves] == [
        "val/embedding_rank",
        "val/embedding_rank_of_average",
    ]
    assert deviation.curves[0][1] == "val/embedding_deviation"


@pytest.mark.slow
def test_the_recipe_for_photos_without_labels_is_followed_by_a_probe_and_exported(world: Path):
    settings = ("data.shards=shards/bare", "data.probe_shards=shards/train", "train.max_steps=2")
    settings += ("data.probe_val_shards=shards/val", "train.evaluate.probe=true")
    settings += ("tracker.wandb.mode=disabled", "run.dir=views")
    done = zeta("train", "first_views", *settings, cwd=world)
    assert done.returncode == 0, done.stderr + done.stdout
    log = RunDir(world / "views").rank_log(0).read_text()
    assert "\nlinear probe learns from 100 images of data.probe_shards and classifies 61 of" in log
    exported = zeta("export", "views", "views_export", cwd=world)
    assert exported.returncode == 0, exported.stderr
