"""`zeta experiment`: equal compute by count, all its files, and nothing trained twice."""

from __future__ import annotations

import json
from itertools import repeat
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from launch.config.load import load_config
from launch.recipes.experiment import ARMS, RESOLUTIONS, design_for, run_experiment, up_to
from launch.report.logged_run import read_run
from launch.shipped import configs_root
from tests.launch.command_line import zeta
from tests.launch.photos import write_photos
from zeta import metric_names as names

QUICK = ("train.max_steps=5", "train.log_every=1", "train.peak_tflops=1", "model.depth=1")


@pytest.mark.parametrize(
    ("compute", "steps"), [(10.0, 1), (14.9, 1), (15.1, 2), (20.0, 2), (1.0, 1), (1004.0, 100)]
)
def test_an_arm_stops_at_the_step_that_is_closest_to_the_compute(compute, steps):
    assert up_to(repeat(10.0), compute) == [10.0 * step for step in range(1, steps + 1)]


def test_an_arm_whose_images_end_before_has_what_there_is():
    assert up_to(iter([10.0, 10.0]), 100.0) == [10.0, 20.0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.resolution.max=64", "sets data.resolution.max itself: that is what the arms differ"),
        ("train.seed=3", "choose how many with --seeds"),
        ("run.dir=x", "choose the folder with --out"),
        ("train.max_step=3", "train.max_steps"),
        ("model.dim=many", "model.dim"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_written(tmp_path, override, words):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=words):
        run_experiment(None, out, seeds=1, nproc=1, overrides=[override])
    assert not out.exists()


def test_a_folder_of_something_else_or_of_another_experiment_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds no experiment; choose another folder with --out"):
        run_experiment(None, tmp_path, seeds=1, nproc=1, overrides=[])
    (tmp_path / "experiment.json").write_text(json.dumps({"source": "cats", "overrides": []}))
    with pytest.raises(ValueError, match="with zeta experiment cats, not zeta experiment;"):
        run_experiment(None, tmp_path, seeds=1, nproc=1, overrides=[])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experiment.json", "thesis.tex"]


def test_the_arms_differ_in_nothing_but_how_they_show_the_images():
    shared = (configs_root() / "experiments/shared.yaml").read_text()
    assert "resolution" not in shared
    for arm in ARMS:
        text = (configs_root() / f"experiments/{arm}.yaml").read_text()
        sections = [line for line in text.splitlines() if line and line[0] not in "# "]
        assert sections == ["include: [experiments/shared]", "data:"]
        keys = {
            line.split(":")[0].strip()
            for line in text.splitlines()
            if line[:3] == "  " + line[2:3].strip()
        }
        assert keys <= {"resolution", "drop", ""}


@pytest.mark.parametrize("sizes", [(96, 224), (32, 64), (128, 384)])
def test_other_sizes_give_arms_that_share_all_but_how_they_show_the_images(sizes):
    small, large = sizes
    design = design_for(sizes)
    assert list(design.arms) == ["navit", f"fixed_{small}", f"fixed_{large}"]
    configs = [
        load_config(
            str(configs_root() / f"experiments/{recipe}.yaml"), ["data.shards=x", *settings]
        )
        for recipe, settings in design.arms.values()
    ]
    assert [config.data.resolution.max for config in configs] == [large, small, large]
    assert configs[0].data.resolution.min <= small
    for config in configs:
        assert config.model == configs[0].model
        assert config.train == configs[0].train
        patches = (config.data.resolution.max // config.model.patch_size) ** 2
        assert config.data.token_budget == configs[0].data.token_budget >= patches
    sides = [int(side) for side in design.resolutions[1:]]
    assert sides == sorted(set(sides))
    assert sides[0] <= small < large < sides[-1]


@pytest.mark.parametrize("sizes", [(96, 96), (224, 96), (8, 96)])
def test_sizes_that_are_no_smaller_and_larger_one_are_refused(sizes):
    with pytest.raises(ValueError, match=r"give a smaller and a larger side"):
        design_for(sizes)


def test_an_experiment_continues_only_with_the_sizes_that_it_began_with(tmp_path):
    (tmp_path / "experiment.json").write_text(json.dumps({"source": "cats", "overrides": []}))
    with pytest.raises(ValueError, match=r"with zeta experiment cats, not .* --sizes 96,224;"):
        run_experiment("cats", tmp_path, seeds=1, nproc=1, overrides=[], sizes=(96, 224))


@pytest.mark.slow
def test_the_arms_have_equal_compute_as_it_was_counted_in_training(tmp_path: Path):
    write_photos(tmp_path / "photos", 20, seed=0)
    command = ("experiment", "photos", "--out", "out", "--nproc", "1", *QUICK)
    done = zeta(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    result = json.loads((out / "result.json").read_text())
    runs = {run["arm"]: run for run in result["runs"]}
    assert list(runs) == list(ARMS)
    for name, run in runs.items():
        record = read_run(out / "runs" / f"{name}_seed0")
        rates, seconds = (record.series[m].values for m in (names.MFU, names.STEP_S))
        assert 1e12 * float(np.sum(rates * seconds)) == pytest.approx(run["flops"], rel=0.02)
        step = run["flops"] / run["steps"]
        assert abs(run["flops"] - runs["navit"]["flops"]) <= 0.5 * step * 1.02
        assert list(run["top1_by_resolution"]) == list(RESOLUTIONS)
        assert len(run["top1_by_flops"]) == len(record.series["val/top1"].steps)
        assert run["top1_by_flops"][-1][0] == run["flops"]
        assert f"{name} " in done.stdout
    assert runs["navit"]["steps"] == 5
    assert (out / "result.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert all(f"</i>{arm}<" in page for arm in ARMS)
    before = {path: path.read_bytes() for path in out.glob("runs/*/metrics.jsonl")}
    again = zeta(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.read_bytes() for path in out.glob("runs/*/metrics.jsonl")} == before
    assert json.loads((out / "result.json").read_text()) == result


def test_the_figures_of_record_are_those_of_three_seeds_at_equal_compute():
    record = json.loads((configs_root() / "experiments/digits.json").read_text())
    assert record["command"] == "zeta experiment --seeds 3"
    assert [run["arm"] for run in record["runs"]] == [*ARMS] * 3
    compute = [run["flops"] for run in record["runs"]]
    assert max(compute) / min(compute) < 1.005
    assert mean(run["val_images"] for run in record["runs"]) == 359
    picture = configs_root() / "experiments/digits.png"
    assert picture.stat().st_size < 100_000
