"""What the README says is true: its commands run as written, its numbers and links hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from PIL import Image

from launch.cli import build_parser
from launch.cluster.sizing import sizing_table
from launch.config.load import load_config
from launch.shipped import configs_root
from tests.data_pipeline.shard_fixtures import jpeg, write_shard
from tests.launch.photos import write_photos
from tests.launch.tiny_export import write_export
from zeta.train.hardware import accelerator

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

NOT_RUN = ("git clone", "make demo", ". .venv/bin/activate")
"""Tested where they belong: tests/launch/test_makefile.py and tests/launch/recipes/test_demo.py."""
SHORTENED = {
    "zeta launch local": "train.max_steps=4 optim.warmup_steps=1",
    "zeta data plan navit_b16_classification data.shards=shards/imagenet": (
        "train.packs_per_step=16"
    ),
    "zeta train navit_b16_classification --dry-run": (
        "train.packs_per_step=16 model.depth=1 train.device=cpu data.token_budget=256"
    ),
    "zeta data plan navit_l16_siglip": "train.packs_per_step=16",
    "zeta finetune": "train.max_steps=3",
}


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


def write_pairs(folder: Path) -> None:
    """Write shards as img2dataset does: image, caption and metadata of each pair, and its notes."""
    folder.mkdir()
    for shard in range(2):
        members = []
        for key in (f"{shard:05d}{number:04d}" for number in range(20)):
            facts = {"caption": f"photo {key}", "width": 60, "height": 40, "status": "success"}
            members += [
                (f"{key}.jpg", jpeg(40, 60, int(key))),
                (f"{key}.json", json.dumps(facts).encode()),
                (f"{key}.txt", facts["caption"].encode()),
            ]
        write_shard(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}_stats.json").write_text("{}")
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")


@pytest.mark.slow
def test_every_shell_command_runs_in_the_order_of_the_readme(tmp_path: Path):
    usable = write_photos(tmp_path / "photos", 12, seed=0)
    write_photos(tmp_path / "photos_held_out", 4, seed=1)
    write_photos(tmp_path / "imagenet/train", 8, seed=2)
    write_photos(tmp_path / "imagenet/val", 2, seed=3)
    write_pairs(tmp_path / "pairs")
    write_photos(tmp_path / "flowers", 4, seed=2)
    (tmp_path / "flowers" / "zebra").rename(tmp_path / "flowers" / "rose")
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


@pytest.mark.slow
def test_the_tables_of_what_fits_are_those_that_the_command_prints():
    commands = re.findall(r"<!-- zeta (launch sizes [^>]*) -->\n((?:\|.*\n)+)", README)
    assert commands
    for command, table in commands:
        args = build_parser().parse_args(command.split())
        gpus = [accelerator(key) for key in args.gpus]
        lines = sizing_table(args.presets, gpus, args.world_size)
        assert table.splitlines() == lines, command


def test_the_figures_of_the_experiment_are_those_of_its_file():
    runs = json.loads((configs_root() / "experiments/digits.json").read_text())["runs"]
    table = README.split("| trained at | images seen |")[1].split("\n\n")[0]
    head, _, *rows = table.splitlines()
    sides = [cell.strip() for cell in head.split("|") if cell.strip()]
    assert len(rows) == 3
    for arm, row in zip(("navit", "fixed_48", "fixed_96"), rows, strict=True):
        mine = [run for run in runs if run["arm"] == arm]
        _, images, *scores = [cell.strip() for cell in row.strip("| ").split("|")]
        seen = mean(run["images_seen"] for run in mine)
        assert int(images.replace(",", "")) == pytest.approx(seen, abs=51)
        for side, score in zip(sides, scores, strict=True):
            top1 = mean(run["top1_by_resolution"][side] for run in mine)
            assert float(score) == pytest.approx(100 * top1, abs=0.051), (arm, side)
    flops = {f"{run['flops'] / 1e12:.2f}" for run in runs}
    assert flops == {"2.47"}
    assert "2.47 TFLOP" in README


def test_the_python_examples_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_export(tmp_path / "exports" / "first", ["a", "b"])
    (tmp_path / "pictures").mkdir()
    for index, size in enumerate([(40, 30), (200, 20), (8, 100)]):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"pictures/{index}.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (embedding,) = (block for block in blocks if "model.embed(" in block)
    (training,) = (block for block in blocks if "NaViT(\n" in block)
    assert len([line for line in embedding.splitlines() if line]) <= 10
    names: dict[str, Any] = {}
    exec(embedding, names)
    assert names["embeddings"].shape == (3, 32)
    assert names["similar"][0] == 0
    names = {}
    exec(training, names)
    assert names["logits"].shape == (2, 1000)


def test_the_table_of_commands_is_complete_and_every_command_in_it_exists():
    listed = {
        re.sub(r" ([A-Z\[-]).*", "", command)
        for command in re.findall(r"^\| `(?:srun \.\.\. )?zeta ([^`]+)` \|", README, re.MULTILINE)
    }
    existing = set()
    parser = build_parser()
    for name, sub in parser._subparsers._group_actions[0].choices.items():
        groups = sub._subparsers._group_actions[0].choices if sub._subparsers else {"": None}
        existing |= {f"{name} {inner}".strip() for inner in groups}
    assert listed == existing


def test_files_and_make_targets_that_the_readme_names_exist():
    folders = "configs|slurm|zeta|data_pipeline|launch"
    for path in re.findall(rf"`((?:{folders})/[\w/.]+|constraints\.txt)`", README):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)`?", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
