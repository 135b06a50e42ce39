"""The programs behind tables of docs/speed.md run, and reckon what they say."""

import subprocess
import sys

import pytest

from launch.config.load import load_config
from tests.benchmarks import learning
from tests.benchmarks.positions import POSITIONS


@pytest.mark.slow
def test_joining_is_compared_round_by_round_with_what_auto_chooses():
    # A process of its own: DeepSpeed keeps the groups of ranks that another test has closed.
    command = [sys.executable, "-m", "tests.benchmarks.joining"]
    command += ["--rounds", "2", "--steps", "1", "--sizes", "1"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = said.splitlines()[-1:]
    assert line.startswith("64 channels, 4 blocks: 4 packs in one pass take ")
    assert line.endswith("auto joins 4")


def test_positions_are_compared_with_fractional_ones():
    command = [sys.executable, "-m", "tests.benchmarks.positions", "--preset", "navit_ti16"]
    command += ["--images", "2", "--rounds", "1"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [[cell.strip() for cell in line.split("|")] for line in said.splitlines()[3:]]
    assert [row[1] for row in rows] == [f"`{name}`" for name in POSITIONS]
    assert (rows[0][3], rows[0][5]) == ("1.000", "1.000")
    assert all(0.9 < float(row[5]) < 1.1 for row in rows)  # activations are counted, not timed


def test_scores_are_means_and_differences_are_those_of_equal_seeds():
    runs = {
        ("digits", "fp32"): [(0.90, 0.5), (0.94, 0.3)],
        ("digits", "bf16"): [(0.91, 0.6), (0.93, 0.4)],
    }
    results = {
        key: [{"val/top1": top1, "val/loss": loss, "train/loss": loss} for top1, loss in values]
        for key, values in runs.items()
    }
    rows = [line.strip("| ").split(" | ") for line in learning.table(results, "dtype")[2:]]
    assert rows[0][:4] == ["digits", "fp32", "0.9200 ± 0.0283", "0.4000 ± 0.1414"]
    assert rows[2][:4] == ["digits", "bf16 - fp32", "+0.0000 ± 0.0141", "+0.1000 ± 0.0000"]


def test_muon_is_compared_with_adamw_at_the_same_rate():
    top1 = dict(
        zip(learning.ARMS["optimizer"], (0.5, 0.7, 0.6, 0.5, 0.1, 0.2, 0.3, 0.3), strict=True)
    )
    results = {
        ("photos", arm): [dict.fromkeys(learning.SCORES, each)] for arm, each in top1.items()
    }
    rows = [row.strip("| ").split(" | ") for row in learning.table(results, "optimizer")[-4:]]
    assert [row[1] for row in rows] == [f"muon {r} - adamw {r}" for r in learning.RATES]
    assert [row[2][:7] for row in rows] == ["+0.2000", "-0.1000", "+0.1000", "+0.0000"]
    for arm, settings in learning.ARMS["optimizer"].items():
        kind, rate = arm.split()
        assert {f"optim.kind={kind}", f"optim.lr={rate}"} < set(settings)


def test_every_augmentation_is_compared_with_flips_and_crops_alone():
    arms = list(learning.ARMS["augmentation"])
    assert learning.compared("augmentation") == [("flip, crop", arm) for arm in arms[1:]]
    for settings in learning.ARMS["augmentation"].values():
        load_config("demo", ["data.shards=unused", *settings])


@pytest.mark.slow
def test_equal_seeds_are_trained_in_both_dtypes_and_a_second_call_trains_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.benchmarks.learning", str(tmp_path)]
    command += ["--seeds", "1", "--steps", "2"]
    first, again = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in "12"
    )
    assert "zeta: finished at step 2" in first
    assert "finished at step" not in again
    assert first.splitlines()[-4:] == again.splitlines()[-4:]
    for dtype in learning.ARMS["dtype"]:
        run = tmp_path / f"digits-{dtype}-0"
        assert f"dtype: {dtype}" in (run / "config.yaml").read_text()
