"""`zeta demo` runs the whole pipeline, survives Ctrl-C, and keeps out of other people's folders."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.launch.command_line import zeta

SETTINGS = ("train.max_steps=48", "optim.warmup_steps=2", "train.log_every=1")


class Demo(NamedTuple):
    out: Path
    done: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """A demo that nothing disturbed, with no compiler and no ninja on its PATH."""
    folder = tmp_path_factory.mktemp("straight")
    out, tools = folder / "my demo", folder / "bin"
    tools.mkdir()
    without = {"PATH": str(tools), "CC": "", "CXX": ""}
    done = zeta("demo", "--out", str(out), *SETTINGS, cwd=folder, environment=without)
    assert done.returncode == 0, done.stderr
    return Demo(out, done)


@pytest.mark.slow
def test_the_demo_makes_everything_it_promises_without_a_compiler(straight: Demo):
    out, done = straight
    for name in ("report.html", "metrics.jsonl", "FINISHED", "pack.svg", "wandb_run_id"):
        assert (out / name).exists()
    assert list(out.glob("wandb/offline-run-*/*.wandb"))
    assert sorted(path.name for path in (out / "logs").iterdir()) == [
        "rank_00000.log",
        "rank_00001.log",
    ]
    result = json.loads((out / "result.json").read_text())
    assert set(result) == {"val_top1", "train_seconds", "fill", "images_per_s"}
    assert result["fill"] > 0.98
    assert '"val/top1"' in (out / "metrics.jsonl").read_text()  # of the last step, at least
    evaluation = json.loads((out / "eval.json").read_text())
    assert evaluation["top1"] == result["val_top1"]
    assert {"native", "48", "128"} <= set(evaluation["by_resolution"])
    assert evaluation["by_resolution"]["native"]["images"] == 359
    assert f"{result['val_top1']:.2%}" in done.stdout
    assert "what to type next, after `. .venv/bin/activate`" in done.stdout  # no zeta on PATH
    for line in (r"step +40/48 +eta", r"loss +\d", r"img/s", r"tok/s", r"fill +9\d"):
        assert re.search(line, done.stdout), done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout + done.stderr  # DeepSpeed's go to the logs


@pytest.mark.slow
def test_ctrl_c_saves_and_a_rerun_continues_to_the_same_weights(tmp_path: Path, straight: Demo):
    interrupted = tmp_path / "interrupted"
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", "demo", "--out", str(interrupted), *SETTINGS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics = interrupted / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(processes_naming(interrupted)) >= 3, "launcher and two ranks"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "continues" in output
    assert not processes_naming(interrupted)
    assert not (interrupted / "FINISHED").exists()

    done = zeta("demo", "--out", str(interrupted), *SETTINGS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in steps if "train/loss" in line] == list(range(1, 49))
    starts = [
        [json.loads(line) for line in (out / "starts.jsonl").read_text().splitlines()]
        for out in (interrupted, straight.out)
    ]
    assert [[start["ranks"] for start in of_run] for of_run in starts] == [[2, 2], [2]]
    assert 5 <= starts[0][1]["step"] < 48
    assert "Started 2 times" in (interrupted / "report.html").read_text()
    assert "Started" not in (straight.out / "report.html").read_text()
    weights = [
        (out / "export" / "model.safetensors").read_bytes() for out in (interrupted, straight.out)
    ]
    assert weights[0] == weights[1]


def processes_naming(folder: Path) -> list[str]:
    """Return the processes that have `folder` among their arguments, as ranks and workers do."""
    listed = subprocess.run(["ps", "-eo", "pid=,args=", "-ww"], capture_output=True, text=True)
    return [line for line in listed.stdout.splitlines() if str(folder) in line]


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("precious")
    done = zeta("demo", "--out", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 1
    assert "holds no demo; choose another folder with --out" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_demo_with_other_settings_is_not_continued(tmp_path: Path):
    settings = {"seed": 0, "overrides": [], "train_seconds": 0.0}
    (tmp_path / "demo.json").write_text(json.dumps(settings))
    done = zeta("demo", "--out", str(tmp_path), "--seed", "3", cwd=tmp_path)
    assert done.returncode == 1
    assert "holds a demo with --seed 0, not --seed 3" in done.stderr


def test_a_wrong_key_is_named_with_the_nearest_right_one(tmp_path: Path):
    done = zeta("demo", "--out", str(tmp_path / "demo"), "train.max_step=3", cwd=tmp_path)
    assert done.returncode == 1
    assert "train.max_steps" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "demo").exists()


def test_settings_that_the_demo_makes_itself_are_refused(tmp_path: Path):
    done = zeta("demo", "--out", str(tmp_path / "demo"), "run.dir=elsewhere", cwd=tmp_path)
    assert done.returncode == 1
    assert "sets run.dir itself: choose the folder with --out" in done.stderr
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_reaches_its_bar(tmp_path: Path):
    done = zeta("demo", "--out", str(tmp_path / "demo"), cwd=tmp_path, timeout=800)
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((tmp_path / "demo" / "eval.json").read_text())
    assert evaluation["by_resolution"]["native"]["top1"] >= 0.95
    for side in ("48", "64", "80", "96"):
        assert evaluation["by_resolution"][side]["top1"] >= 0.96
