"""The comparisons behind tables of docs/experiments.md run, and reckon what they say."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from launch.config.load import load_config
from tests.benchmarks.learning import settings, without_labels


def test_scores_are_means_and_differences_are_those_of_equal_seeds():
    runs = {
        ("digits", "fp32"): [(0.90, 0.5), (0.94, 0.3)],
        ("digits", "bf16"): [(0.91, 0.6), (0.93, 0.4)],
    }
    results = {
        key: [{"val/top1": top1, "val/loss": loss, "train/loss": loss} for top1, loss in values]
        for key, values in runs.items()
    }
    rows = [line.strip("| ").split(" | ") for line in settings.table(results, "dtype")[2:]]
    assert rows[0][:4] == ["digits", "fp32", "0.9200 ± 0.0283", "0.4000 ± 0.1414"]
    assert rows[2][:4] == ["digits", "bf16 - fp32", "+0.0000 ± 0.0141", "+0.1000 ± 0.0000"]


def test_muon_is_compared_with_adamw_at_the_same_rate():
    top1 = dict(
        zip(settings.ARMS["optimizer"], (0.5, 0.7, 0.6, 0.5, 0.1, 0.2, 0.3, 0.3), strict=True)
    )
    results = {
        ("photos", arm): [dict.fromkeys(settings.SCORES, each)] for arm, each in top1.items()
    }
    rows = [row.strip("| ").split(" | ") for row in settings.table(results, "optimizer")[-4:]]
    assert [row[1] for row in rows] == [f"muon {r} - adamw {r}" for r in settings.RATES]
    assert [row[2][:7] for row in rows] == ["+0.2000", "-0.1000", "+0.1000", "+0.0000"]
    for arm, own in settings.ARMS["optimizer"].items():
        kind, rate = arm.split()
        assert {f"optim.kind={kind}", f"optim.lr={rate}"} < set(own)


def test_every_augmentation_is_compared_with_flips_and_crops_alone():
    arms = list(settings.ARMS["augmentation"])
    assert settings.compared("augmentation") == [("flip, crop", arm) for arm in arms[1:]]
    for own in settings.ARMS["augmentation"].values():
        load_config("demo", ["data.shards=unused", *own])


@pytest.mark.slow
def test_equal_seeds_are_trained_in_both_dtypes_and_a_second_call_trains_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.benchmarks.learning.settings", str(tmp_path)]
    command += ["--seeds", "1", "--steps", "2"]
    first, again = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in "12"
    )
    assert "zeta: finished at step 2" in first
    assert "finished at step" not in again
    assert first.splitlines()[-4:] == again.splitlines()[-4:]
    for dtype in settings.ARMS["dtype"]:
        run = tmp_path / f"digits-{dtype}-0"
        assert f"dtype: {dtype}" in (run / "config.yaml").read_text()


@pytest.mark.slow
def test_without_labels_every_arm_is_trained_with_as_much_compute_and_scored_by_the_same_probe(
    tmp_path,
):
    draws = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for name, level in (("dark", 60), ("light", 160)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = level + draws.integers(0, 40, (16, 16, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{split}/{name}/{i}.png")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.benchmarks.learning.without_labels", str(out)]
    command += ["--photos", str(tmp_path), "--steps", "3", "--seeds", "0"]
    first, again = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in "12"
    )
    assert first.count("zeta: finished at step") == 3
    assert "finished at step" not in again
    assert first.splitlines()[-7:] == again.splitlines()[-7:]
    rows = [line.strip("| ").split(" | ") for line in again.splitlines()[-5:]]
    encoders = ["pixels", "initialisation", *without_labels.ARMS]
    assert [row[0] for row in rows] == encoders
    assert float(rows[0][1].split()[0]) == 100  # the pixels tell light from dark
    scores = {arm: json.loads((out / f"{arm}-0.json").read_text()) for arm in without_labels.ARMS}
    compute = scores["lejepa"]["tflop"]
    for found in scores.values():
        assert abs(found["tflop"] - compute) < compute / found["steps"]  # to the nearest step
        assert found["cpu_min"] > 0
    objectives = {"lejepa": "lejepa", "supervised": "softmax", "distill": "distill"}
    for arm, kind in objectives.items():
        assert f"kind: {kind}" in (out / f"runs/{arm}-0/config.yaml").read_text()
