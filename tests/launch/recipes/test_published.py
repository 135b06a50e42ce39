"""Folders of published encoders go where exports go: `zeta finetune`, `embed` and `eval --knn`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.launch.command_line import zeta
from tests.launch.photos import CLASSES, write_photos
from tests.zeta.models.published.encoders import encoder
from tests.zeta.models.published.test_eva import saved as saved_eva
from tests.zeta.models.published.test_timm_vit import saved as saved_timm
from zeta.checkpoint.directory import load_full_weights
from zeta.models.config import load_pretrained
from zeta.models.exported import read_config
from zeta.models.published.reading import open_published

QUIET = ("tracker.wandb.mode=disabled", "data.workers=0", "train.log_every=1")
HUB = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
KINDS = (
    "siglip2",
    "siglip",
    "dinov2",
    "dinov2-registers",
    "dinov3",
    "vit",
    "clip",
    "eva",
    "timm-dinov3",
)
_EVAS = {"eva": "eva02_tiny_patch14_224", "timm-dinov3": "vit_small_patch16_dinov3"}
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
        if name in _EVAS:
            saved_eva(folder / name, _EVAS[name])
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


RECIPE = """
include: [data/digits, train/short, cluster/cpu]
data: {shards: shards/train, workers: 0, views: 2, token_budget: 512, max_images_per_pack: 24}
objective: {kind: lejepa, lejepa: {hidden: 16, dim: 8, slices: 8}}
train: {max_steps: 1, packs_per_step: 1, zero_stage: 2, dtype: fp32}
optim: {lr: 0.0, schedule: constant, warmup_share: 0.0}
tracker: {wandb: {mode: disabled}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov3", "timm-vit"])
def test_pretraining_without_labels_goes_on_from_an_encoder(world: Path, name: str):
    """The encoder is taken, the projector and the head are not, and both are said."""
    (world / "lejepa.yaml").write_text(RECIPE)
    options = open_published(world / name).options.split()
    settings = (f"run.dir=runs/lejepa-{name}", f"train.init_from={name}", *options)
    done = zeta("train", "lejepa.yaml", *settings, "model.num_classes=1", cwd=world)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert "its image encoder alone: projector and the head keep their initial values" in said
    there = load_pretrained(world / name).state_dict()
    weights = load_full_weights(world / f"runs/lejepa-{name}/checkpoints/step_00000001")
    assert any(key.startswith("projector.") for key in weights)
    for key, value in weights.items():
        if key.startswith("image.") and not key.startswith("image.head."):
            assert torch.equal(value, there[key.removeprefix("image.")]), key
