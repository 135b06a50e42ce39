"""What was written before the modules moved into folders still verifies, goes on, loads and trains.

`tests/fixtures/before_rooms/README.md` says what there is, and which commit made it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.shards.manifest import Manifest
from zeta import MegaVit, NaViT

FIXTURE = Path(__file__).parent / "fixtures/before_rooms"
LOSSES = ("train/loss", "val/loss", "val/loss_of_average")
CONTINUED = {
    "zero2 on 2 ranks": ("zero2", 2),
    "zero2 on 1 rank": ("zero2", 1),
    "zero0": ("zero0", 1),
    "zero0 at stage 2": ("zero0", 1, "train.zero_stage=2"),
    "sgd": ("sgd", 1),
    "image_text": ("image_text", 1),
}
"""Run, ranks, and settings besides where it ends."""
SHAPES = {
    "both": ((3, 24, 40), (3, 16, 16)),
    "image_text": ((3, 24, 40), (3, 16, 16)),
    "megavit": ((3, 16, 16), (3, 16, 16)),
}
"""Of the images that an export is asked about."""


def expected(of):
    return json.loads((FIXTURE / "expected.json").read_text())[of]


def copy_to(folder):
    """Copy the fixture, shards with the times that the manifest and the checkpoints know."""
    shutil.copytree(FIXTURE, folder)
    for name, time in json.loads((folder / "mtimes.json").read_text()).items():
        os.utime(folder / name, ns=(time, time))
    return folder


@pytest.fixture
def before(tmp_path):
    return copy_to(tmp_path / "before")


def zeta(folder, *arguments):
    """Run a command that must succeed, and return what it says."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "launch", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def continue_run(folder, name, ranks, *settings):
    """Train a run on to step 10; return what was said."""
    settings = (f"run_dirs/{name}/config.yaml", "train.max_steps=10", *settings)
    if ranks == 1:
        return zeta(folder, "train", *settings)
    return zeta(folder, "launch", "local", *settings, "--nproc", ranks, "--max-restarts", 0)


def losses(run, after=0):
    """Return all losses of a run, by step and name."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {
        f"{row['step']} {name}": row[name]
        for row in rows
        if row["step"] > after
        for name in LOSSES
        if name in row
    }


def begin_at(folder, weights):
    """Train two steps of a new run from the weights of a run or an export; return its losses."""
    new = ("run.dir=new", "train.max_steps=2", "optim.warmup_steps=0", f"train.init_from={weights}")
    zeta(folder, "train", "run_dirs/zero0/config.yaml", *new)
    return losses(folder / "new")


def images(name):
    torch.manual_seed(0)
    return [torch.rand(shape) for shape in SHAPES[name]]


@torch.no_grad()
def logits(export):
    model = (MegaVit if export.name == "megavit" else NaViT).from_pretrained(export)
    # The pictures of then are floats from 0 to 1, which are refused today.
    with mock.patch("zeta.models.packed_vit.check_normalised"):
        return model(images(export.name)).tolist()


@torch.no_grad()
def timm_logits(export):
    timm = pytest.importorskip("timm")
    model = timm.create_model(f"local-dir:{export}", pretrained=True).eval()
    return [model(image[None])[0].tolist() for image in images(export.name)]


def zero_shot(folder):
    """Return the loss of images classified by the text encoder of an export and the class names."""
    size = ("--resolutions", "native")
    said = zeta(
        folder, "eval", "exports/image_text", "shards/val", "--template", "{}", *size, "--json"
    )
    return json.loads(said.splitlines()[-1])["loss"]


def close(numbers):
    return [pytest.approx(row, rel=1e-6, abs=1e-6) for row in numbers]


@pytest.mark.slow
@pytest.mark.parametrize("case", CONTINUED)
def test_a_run_goes_on_from_its_checkpoint_with_the_losses_it_would_have_had(before, case):
    name, *how = CONTINUED[case]
    assert "continuing from step_00000006" in continue_run(before, name, *how)
    wanted = expected("continued")[case]
    # The run with dropout draws by image since; its momentum still carries it the same way.
    close = 2e-2 if name == "sgd" else 1e-5
    assert losses(before / "run_dirs" / name, after=6) == pytest.approx(wanted, rel=close)
    said = zeta(before, "data", "audit", f"run_dirs/{name}")
    assert "10 steps were planned again" in said
    assert "exact: every planned sample was trained on or rejected, once" in said


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["run_dirs/zero2", "exports/both"])
def test_a_new_run_begins_at_the_weights_of_a_run_or_an_export(before, weights):
    assert begin_at(before, weights) == pytest.approx(expected("begun"), rel=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_an_export_gives_the_logits_it_gave(name):
    assert logits(FIXTURE / "exports" / name) == close(expected("logits")[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["both", "megavit"])
def test_an_export_gives_the_logits_it_gave_in_timm(name):
    assert timm_logits(FIXTURE / "exports" / name) == close(expected("timm logits")[name])


@pytest.mark.slow
def test_a_text_encoder_classifies_as_it_did(before):
    assert zero_shot(before) == pytest.approx(expected("zero shot"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "export", "form"), [("zero2", "both", "both"), ("image_text", "image_text", "zeta")]
)
def test_a_checkpoint_is_exported_as_it_was(before, run, export, form):
    zeta(before, "export", f"run_dirs/{run}", "again", "--format", form, "--overwrite")
    was, now = before / "exports" / export, before / "again"
    assert {file.name for file in now.iterdir()} == {file.name for file in was.iterdir()}
    config, before_it = (json.loads((folder / "config.json").read_text()) for folder in (now, was))
    assert config["info"].pop("targets") in ("label", "caption")  # new facts
    assert config["info"].pop("run") == before_it["info"].pop("recipe")  # its name until then
    assert set(config.pop("sha256")) == {file.name for file in now.glob("*.safetensors")}
    if form != "zeta":
        assert config["pretrained_cfg"].pop("crop_mode")
        # transformers loses options of None on the way to timm, so that none is left.
        ours, theirs = config.pop("model_args"), before_it.pop("model_args")
        changed = {name for name in ours if ours[name] != theirs.get(name)}
        assert changed <= {"init_values", "norm_layer"}, changed
    assert config == before_it
    for file in was.glob("*.safetensors"):
        weights, wanted = load_file(now / file.name), load_file(file)
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted), file.name


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val", "captions"])
def test_shards_are_whole_and_their_index_is_taken_and_made_as_it_was(before, split):
    shards = before / "shards" / split
    assert ", 0 faults" in zeta(before, "shards", "verify", shards)
    was = {file.name: file.read_bytes() for file in shards.iterdir()}
    fingerprint = Manifest.open(str(shards)).fingerprint
    zeta(before, "shards", "index", shards, "--no-checksums")
    assert {file.name: file.read_bytes() for file in shards.iterdir()} == was
    for index in shards.glob("manifest*"):
        index.unlink()
    zeta(before, "shards", "index", shards)
    now = {file.name: file.read_bytes() for file in shards.iterdir()}
    assert {name: now.get(name) for name in was if name != "manifest.json"} == {
        name: content for name, content in was.items() if name != "manifest.json"
    }
    assert Manifest.open(str(shards)).fingerprint == fingerprint
