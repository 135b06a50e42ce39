"""What the README says is true: its commands run as written, its numbers and links hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import build_parser
from launch.config import load_config
from tests.launch.photos import write_photos

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

NOT_RUN = ("git clone", "make demo", ". .venv/bin/activate")
"""Tested where they belong: tests/launch/test_makefile.py and tests/launch/test_demo.py."""
SHORTENED = {"zeta launch local": "train.max_steps=4 optim.warmup_steps=1"}


def _joined(block: str) -> list[str]:
    return block.replace("\\\n", " ").splitlines()


def shell_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in _joined(block) if line.strip()]
    return [line for line in lines if not line.startswith(NOT_RUN)]


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", README, re.DOTALL))
def test_every_piece_of_a_recipe_is_a_valid_config(tmp_path: Path, block: str):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"include: [model/navit_b16]\n{block}")
    shards = [] if "shards:" in block else ["data.shards=shards/photos"]
    config = load_config(str(recipe), [*shards, "train.max_steps=100"])
    assert config.train.max_steps == 100


@pytest.mark.slow
def test_every_shell_command_runs_in_the_order_of_the_readme(tmp_path: Path):
    usable = write_photos(tmp_path / "photos", 10, seed=0)
    write_photos(tmp_path / "photos_held_out", 4, seed=1)
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    commands = shell_commands()
    assert len(commands) >= 8
    for command in commands:
        for start, settings in SHORTENED.items():
            if command.startswith(start):
                command = f"{command} {settings}"
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"PATH": tools},
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "runs/first/report.html").stat().st_size > 50_000
    assert (tmp_path / "exports/first/model.safetensors").exists()
    parts = [tmp_path / "shards/photos" / name for name in ("train", "val")]
    manifests = [json.loads((part / "manifest.json").read_text()) for part in parts]
    counts = [sum(shard["count"] for shard in manifest["shards"]) for manifest in manifests]
    assert sum(counts) == usable + 3  # + the unusable ones
    assert min(counts) >= 1
    quarantined = "".join(path.read_text() for path in tmp_path.glob("runs/first/quarantine*"))
    assert "zebra/cut" in quarantined
    metrics = (tmp_path / "runs/first/metrics.jsonl").read_text()
    assert '"val/top1"' in metrics
    assert not (tmp_path / "pwned").exists()


def test_the_python_example_runs_as_written():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["logits"].shape == (2, 1000)


def test_the_table_of_commands_is_complete_and_every_command_in_it_exists():
    listed = {
        re.sub(r" ([A-Z\[-]).*", "", command)
        for command in re.findall(r"^\| `zeta ([^`]+)` \|", README, re.MULTILINE)
    }
    existing = set()
    parser = build_parser()
    for name, sub in parser._subparsers._group_actions[0].choices.items():
        groups = sub._subparsers._group_actions[0].choices if sub._subparsers else {"": None}
        existing |= {f"{name} {inner}".strip() for inner in groups}
    assert listed == existing


def test_files_and_make_targets_that_the_readme_names_exist():
    for path in re.findall(r"`(configs/[\w/.]+|constraints\.txt|slurm/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)`?", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
