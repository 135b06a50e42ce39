"""Folders of published encoders go where exports go: `zeta finetune`, `embed` and `eval --knn`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.launch.command_line import zeta
from tests.launch.photos import CLASSES, write_photos
from tests.zeta.models.published.encoders import encoder
from tests.zeta.models.published.test_eva import saved as saved_eva
from tests.zeta.models.published.test_timm_vit import saved as saved_timm
from zeta.models.config import load_pretrained
from zeta.models.exported import read_config

QUIET = ("tracker.wandb.mode=disabled", "data.workers=0", "train.log_every=1")
HUB = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
KINDS = ("siglip2", "siglip", "dinov2", "dinov2-registers", "dinov3", "vit", "clip", "eva")
TIMM = {
    "timm-vit": ("vit_base_patch16_clip_quickgelu_224", HUB | {"img_size": 40}),
    "naflexvit": ("naflexvit_base_patch16_map", HUB),
}
"""Architectures of timm and their sizes, by the name of the folder."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos and shards of them, and a small encoder of each kind."""
    folder = tmp_path_factory.mktemp("published")
    write_photos(folder / "photos", 12, seed=0)
    for name, (architecture, arguments) in TIMM.items():
        saved_timm(folder / name, architecture, **arguments)
    for name in KINDS:
        if name == "eva":
            saved_eva(folder / name, "eva02_tiny_patch14_224")
        else:
            encoder(name).save_pretrained(folder / name)
    done = zeta("shards", "build", "photos", "shards", "--val-share", "0.3", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [*KINDS, *TIMM])
def test_training_goes_on_from_each_kind_of_encoder(world: Path, name: str):
    """Two steps at ZeRO stage 2, from the encoder's own features and with a head of zeros."""
    settings = (f"run.dir=runs/{name}", "train.max_steps=2", "train.zero_stage=2", "optim.lr=1e-3")
    done = zeta("finetune", name, "photos", *settings, *QUIET, cwd=world)
    assert done.returncode == 0, done.stdout + done.stderr
    run = world / "runs" / name
    assert read_config(run / "export")["info"]["class_names"] == sorted(CLASSES)
    record = json.loads((run / "finetune.json").read_text())
    assert record["before"]["loss"] == pytest.approx(np.log(3), abs=1e-4)
    before, after = load_pretrained(world / name), load_pretrained(run / "export")
    assert after.rotary == before.rotary
    change = (after.blocks[0].attn.qkv.weight - before.blocks[0].attn.qkv.weight).abs().max()
    assert 0 < change < 0.02  # two steps from its weights, not from random ones


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov3", "siglip2", *TIMM])
def test_features_and_their_neighbours_are_those_of_the_encoder(world: Path, name: str):
    done = zeta("embed", name, "shards/val", f"features/{name}", cwd=world)
    assert done.returncode == 0, done.stdout + done.stderr
    features = np.load(world / "features" / name / "features.npy")
    assert features.shape[1] == 32
    assert np.isfinite(features).all()
    done = zeta("eval", name, "shards/val", "--knn", "shards/train", "--json", cwd=world)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert 0 <= found["knn"]["top1"] <= 1
    assert found["knn"]["images"] == len(features)
    assert (found["top1"] is None) == (name not in TIMM)  # these have a head, of seven classes
