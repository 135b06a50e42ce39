"""README.md and docs/ are true: commands and examples run as written, numbers and links hold."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from launch.cli import build_parser
from launch.cluster.sizing import sizing_table
from launch.config.describe import markdown
from launch.config.load import load_config
from launch.shipped import configs_root
from tests.data_pipeline.shard_fixtures import jpeg, write_shard
from tests.launch.command_line import zeta
from tests.launch.photos import write_photos
from tests.launch.tiny_export import write_export
from zeta.train.hardware import accelerator

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
}

NOT_RUN = ("git clone", "make ", "pre-commit", ". .venv/bin/activate")
"""Tested where they belong: tests/launch/test_makefile.py and tests/launch/recipes/test_demo.py."""
SHORTENED = {
    "zeta launch local": "train.max_steps=4",
    "zeta data plan navit_b16_classification data.shards=shards/imagenet": (
        "train.packs_per_step=16"
    ),
    "zeta train navit_b16_classification --dry-run": (
        "train.packs_per_step=16 model.depth=1 train.device=cpu data.token_budget=256"
    ),
    "zeta data plan navit_l16_siglip": "train.packs_per_step=16",
    "zeta finetune": "train.max_steps=3",
}
SHELL = re.compile(r"[$*?{}<>|&;~`#]")
"""What a shell would expand; other commands are given to `zeta` as the words that they are."""
FOLDERS = "configs|slurm|zeta|data_pipeline|launch|tests|docs"


def _joined(block: str) -> list[str]:
    return block.replace("\\\n", " ").splitlines()


def blocks(kind: str) -> list[tuple[str, str]]:
    """Return (document, text) of every block of a kind, in the order in which they run."""
    return [
        (name, block)
        for name, text in DOCUMENTS.items()
        for block in re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]


def shell_commands(document: str) -> list[str]:
    here = [block for name, block in blocks("sh") if name == document]
    lines = [line for block in here for line in _joined(block) if line.strip()]
    return [line for line in lines if not line.startswith(NOT_RUN)]


WITH_COMMANDS = [name for name in DOCUMENTS if name != "README.md" and shell_commands(name)]
QUOTED = re.findall(
    r"^`([\w/.]+)`:\n\n```python\n(.*?)^```",
    DOCUMENTS["docs/extending.md"],
    re.DOTALL | re.MULTILINE,
)
"""The files that docs/extending.md quotes, each with the piece of it."""


@pytest.mark.parametrize(("document", "block"), blocks("yaml"))
def test_every_piece_of_a_recipe_is_a_valid_config(tmp_path: Path, document: str, block: str):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"include: [model/navit_b16]\n{block}")
    shards = [] if "shards:" in block else ["data.shards=shards/photos"]
    config = load_config(str(recipe), [*shards, "train.max_steps=100"])
    assert config.train.max_steps == 100, document


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


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images in which the commands of the README have run; other pages build on it."""
    folder = tmp_path_factory.mktemp("walked")
    write_photos(folder / "photos", 12, seed=0)
    write_photos(folder / "photos_held_out", 4, seed=1)
    write_photos(folder / "imagenet/train", 8, seed=2)
    write_photos(folder / "imagenet/val", 2, seed=3)
    write_pairs(folder / "pairs")
    write_photos(folder / "flowers", 4, seed=2)
    (folder / "flowers" / "zebra").rename(folder / "flowers" / "rose")
    run_commands("README.md", folder)
    return folder


def run_commands(document: str, folder: Path) -> None:
    """Run the shell commands of a document in their order, each to its end without an error."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in shell_commands(document):
        for start, settings in SHORTENED.items():
            if command.startswith(start) and "--mode probe" not in command:  # that has no steps
                command = f"{command} {settings}"
        if command.startswith("zeta ") and not SHELL.search(command):
            done = zeta(*shlex.split(command)[1:], cwd=folder, environment={"PATH": tools})
        else:
            done = subprocess.run(
                command,
                shell=True,
                cwd=folder,
                capture_output=True,
                text=True,
                env=os.environ | {"PATH": tools},
            )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_the_commands_of_the_readme_run_and_leave_a_run_a_report_and_an_export(walked: Path):
    assert (walked / "runs/first/report.html").stat().st_size > 50_000
    assert (walked / "exports/first/model.safetensors").exists()
    parts = [walked / "shards/photos" / name for name in ("train", "val")]
    manifests = [json.loads((part / "manifest.json").read_text()) for part in parts]
    counts = [sum(shard["count"] for shard in manifest["shards"]) for manifest in manifests]
    names = [path.name for path in (walked / "photos").glob("*/*") if path.suffix != ".txt"]
    assert sum(counts) == sum(not name.startswith(".") for name in names) > 36
    assert min(counts) >= 1
    quarantined = "".join(path.read_text() for path in walked.glob("runs/first/quarantine*"))
    assert "zebra/cut" in quarantined
    metrics = (walked / "runs/first/metrics.jsonl").read_text()
    assert '"val/top1"' in metrics
    assert not (walked / "pwned").exists()


@pytest.mark.slow
@pytest.mark.parametrize("document", WITH_COMMANDS)
def test_every_shell_command_of_a_page_runs_after_those_of_the_readme(walked: Path, document: str):
    run_commands(document, walked)


@pytest.mark.slow
def test_the_tables_of_what_fits_are_those_that_the_command_prints():
    commands = re.findall(
        r"<!-- zeta (launch sizes [^>]*) -->\n((?:\|.*\n)+)", DOCUMENTS["docs/imagenet.md"]
    )
    assert commands
    for command, table in commands:
        args = build_parser().parse_args(command.split())
        gpus = [accelerator(key) for key in args.gpus]
        lines = list(sizing_table(args.presets, gpus, args.world_size))
        assert table.splitlines() == lines, command


def test_the_figures_of_the_experiment_are_those_of_its_file():
    runs = json.loads((configs_root() / "experiments/digits.json").read_text())["runs"]
    text = DOCUMENTS["docs/experiments.md"]
    table = text.split("| trained at | images seen |")[1].split("\n\n")[0]
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
    assert "2.47 TFLOP" in text


@pytest.fixture
def example_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the Python examples open: an export, pictures, indexed shards."""
    write_export(tmp_path / "exports" / "first", ["a", "b"])
    (tmp_path / "pictures").mkdir()
    for index, size in enumerate([(40, 30), (200, 20), (8, 100)]):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"pictures/{index}.jpg")
    write_photos(tmp_path / "photos", 12, seed=0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python_example(document: str, mark: str) -> dict[str, Any]:
    """Run the one block of a document that holds `mark`, and return its names."""
    (block,) = (text for name, text in blocks("python") if name == document and mark in text)
    names: dict[str, Any] = {}
    exec(block, names)
    return names


def test_the_embedding_example_embeds_pictures(example_folder: Path):
    names = python_example("README.md", "model.embed(")
    assert names["embeddings"].shape == (3, 32)
    assert names["similar"][0] == 0


@pytest.mark.slow
def test_the_model_example_gives_logits(example_folder: Path):
    assert python_example("docs/export.md", "NaViT(\n")["logits"].shape == (2, 1000)


def test_the_library_example_reads_packs_and_resumes(example_folder: Path):
    from data_pipeline import PackLoader, build_shards

    build_shards("photos", "shards/photos/train")
    names = python_example("docs/data.md", "PackLoader(plan)")
    assert [step.shape[1] for step in names["logits"]] == [3, 3]
    straight = next(itertools.islice(PackLoader(names["plan"]).steps(None), 5, None))
    assert names["resumed"].step == 5
    for resumed, expected in zip(names["resumed"].packs, straight.packs, strict=True):
        assert resumed.sample_ids.tolist() == expected.sample_ids.tolist()
        assert torch.equal(resumed.patches, expected.patches)


def test_every_python_example_is_tested_or_needs_other_software():
    tested = ("model.embed(", "NaViT(\n", "PackLoader(plan)")
    examples = [text for name, text in blocks("python") if name != "docs/extending.md"]
    rest = [text for text in examples if not any(mark in text for mark in tested)]
    assert all("timm" in text for text in rest), rest


def test_the_examples_of_extensions_are_the_code_that_the_tests_run():
    assert len(QUOTED) == len([name for name, _ in blocks("python") if name == "docs/extending.md"])
    assert len(QUOTED) >= 4
    for path, code in QUOTED:
        assert code in (ROOT / path).read_text(), f"docs/extending.md shows other code of {path}"


@pytest.mark.slow
def test_the_script_in_docs_embeds_photos_and_draws_their_pack(example_folder: Path):
    script = ROOT / "docs/examples/photos_to_pack.py"
    done = subprocess.run([sys.executable, script, "photos", "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    keys = Path("out/keys.txt").read_text().splitlines()
    embeddings = np.load("out/embeddings.npy")
    assert embeddings.shape == (len(keys), 192)
    assert len(keys) >= 36
    assert Path("out/pack.svg").read_text().startswith("<svg")


def test_the_reference_of_settings_is_current():
    assert DOCUMENTS["docs/config.md"] == markdown(), "type: make docs"


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 170


def test_links_between_documents_lead_somewhere():
    for name, text in DOCUMENTS.items():
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
            assert ((ROOT / name).parent / target).exists(), (name, target)


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


def test_files_and_make_targets_that_the_documents_name_exist():
    makefile = (ROOT / "Makefile").read_text()
    for name, text in DOCUMENTS.items():
        for path in re.findall(rf"`((?:{FOLDERS})/[\w/.]+|constraints\.txt)`", text):
            assert (ROOT / path).exists(), (name, path)
        for target in re.findall(r"`make ([a-z-]+)`", text):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (name, target)
