"""Captioned shards to image-text training to export, through the command line."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.loading.tokenizer import open_tokenizer
from data_pipeline.shards.build import build_shards
from launch.export import export_run
from launch.report.first_pack import titles
from tests.launch.command_line import zeta
from tests.zeta.training import lane_pack
from zeta.checkpoint.directory import load_full_weights
from zeta.models.config import load_pretrained
from zeta.models.exported import read_config

COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 160, 40),
    "blue": (40, 50, 210),
    "yellow": (220, 210, 40),
    "white": (240, 240, 240),
    "black": (15, 15, 15),
}
RECIPE = """
include: [model/digits, data/digits, train/short, cluster/cpu]
model: {depth: 2}
objective:
  kind: %s
  embed_dim: 32
  text: {dim: 32, depth: 2, heads: 2, mlp_dim: 64}
data:
  text: {max_tokens: 32}
  workers: 0
  max_images_per_pack: 9
  token_budget: 1024
  drop: {kind: none}
train: {packs_per_step: 2, max_steps: 8, log_every: 2, checkpoint_every: 4}
optim: {warmup_steps: 2}
tracker: {wandb: {mode: disabled}}
"""

CLASSIFIER = """
include: [model/digits, data/digits, train/short, cluster/cpu]
model: {depth: 2, num_classes: 32}
data: {workers: 0, max_images_per_pack: 9, token_budget: 1024, drop: {kind: none}}
train: {packs_per_step: 1, max_steps: 1}
optim: {lr: 0.0, warmup_steps: 0}
tracker: {wandb: {mode: disabled}}
"""


def pictures():
    """Each two colours side by side, 36 in all (18 a step), with a caption that says which."""
    for left, right in itertools.product(COLOURS, repeat=2):
        pixels = np.zeros((32, 48, 3), dtype=np.uint8)
        pixels[:, :24], pixels[:, 24:] = COLOURS[left], COLOURS[right]
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        caption = f"{left}, then {right}"
        named = {"txt": caption.encode()}
        if right == "red":
            named = {"json": json.dumps({"caption": caption}).encode()}
        yield f"{left}-{right}", {"png": stream.getvalue(), **named}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards/pairs, recipes for both losses, and a finished SigLIP run."""
    folder = tmp_path_factory.mktemp("pairs")
    build_shards(list(pictures()), folder / "shards", max_count=12)
    for kind in ("siglip", "clip"):
        (folder / f"{kind}.yaml").write_text(RECIPE % kind)
    done = train(folder, "siglip.yaml", "run.dir=run")
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


def train(world: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    recipe, *changes = settings
    return zeta("train", recipe, "data.shards=shards", *changes, cwd=world)


def metrics(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "train/loss" in line]


@pytest.mark.slow
def test_loss_falls_and_recall_rises_on_pictures_that_captions_tell_apart(world):
    for kind in ("siglip", "clip"):
        run = world / f"long_{kind}"
        settings = ("train.max_steps=100", "train.log_every=10", "train.checkpoint_every=100")
        settings += ("data.val_shards=shards", "train.evaluate.every=100")
        done = train(world, f"{kind}.yaml", f"run.dir={run}", *settings)
        assert done.returncode == 0, done.stderr + done.stdout
        first, *_, last = metrics(run)
        assert last["train/loss"] < 0.5 * first["train/loss"]
        for direction in ("image_to_text", "text_to_image"):
            assert first[f"train/{direction}_recall1"] < 0.3
            assert last[f"train/{direction}_recall1"] > 0.6
        assert last["train/truncated"] == 0
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        (held_out,) = [line for line in lines if "val/loss" in line]
        assert held_out["val/images"] == 36
        assert held_out["val/image_to_text_recall1"] > 0.6
        assert held_out["val/text_to_image_recall5"] > 0.9

    exported = zeta("export", "long_siglip", "long_export", cwd=world)
    assert exported.returncode == 0, exported.stderr
    found = zero_shot(world, "long_export", "--template", "{}")
    assert found["images"] == 36
    assert found["top1"] > 0.6
    assert found["top5"] > 0.9
    assert found["per_class"]["red, then blue"]["images"] == 1


def zero_shot(world: Path, export: str, *options: str) -> dict[str, Any]:
    """Each picture against all captions, given as names of classes alone."""
    names, samples = [], []
    for number, (key, files) in enumerate(pictures()):
        caption = files.get("txt") or json.loads(files["json"])["caption"].encode()
        names.append(caption.decode())
        samples.append((key, {"png": files["png"], "cls": str(number).encode()}))
    if not (world / "labelled").exists():
        build_shards(samples, world / "labelled", class_names=names)
    done = zeta("eval", export, "labelled", "--json", *options, cwd=world)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_two_ranks_train_the_same_run_and_the_audit_holds(world):
    settings = ("siglip.yaml", "--nproc", "2", "data.shards=shards", "run.dir=two")
    done = zeta("launch", "local", *settings, cwd=world)
    assert done.returncode == 0, done.stderr + done.stdout
    for alone, shared in zip(metrics(world / "run"), metrics(world / "two"), strict=True):
        assert shared["train/loss"] == pytest.approx(alone["train/loss"], abs=1e-5)
    audited = zeta("data", "audit", "two", cwd=world)
    assert audited.returncode == 0, audited.stdout + audited.stderr


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(world):
    done = train(world, "siglip.yaml", "run.dir=run", "train.max_steps=10")
    assert done.returncode == 0, done.stderr + done.stdout
    assert metrics(world / "run")[-1]["step"] == 10


@pytest.mark.slow
def test_the_export_holds_the_image_encoder_the_text_encoder_and_the_tokenizer(world):
    from zeta.export.text_encoder import load_text_encoder

    exported = zeta("export", "run", "export", cwd=world)
    assert exported.returncode == 0, exported.stderr
    image = load_pretrained(world / "export")
    config = read_config(world / "export")
    text, scale, bias = load_text_encoder(world / "export")
    tokenizer = open_tokenizer(config["text"]["tokenizer"])
    captions = [tokenizer.encode(f"{left}, then blue") for left in COLOURS]
    with torch.no_grad():
        assert image([torch.zeros(3, 32, 48)]).shape == (1, 32)
        assert text(captions).shape == (6, 32)
    assert 0 < scale < 100
    assert bias < 0
    again = zeta("export", "run", "export", "--overwrite", cwd=world)
    assert again.returncode == 0, again.stderr
    refused = zeta("eval", "export", "shards", cwd=world)
    assert refused.returncode == 1
    assert "image-text" in refused.stderr
    timm = zeta("export", "run", "timm", "--format", "timm", cwd=world)
    assert timm.returncode == 0, timm.stderr


@pytest.mark.slow
def test_the_space_for_the_text_encoder_is_counted_where_it_is_exported(world, monkeypatch):
    export_run(world / "run", world / "measured")
    image = (world / "measured/model.safetensors").stat().st_size  # its weights, and a header
    assert (world / "measured/text.safetensors").stat().st_size > image / 10
    nearly_full = shutil.disk_usage(world)._replace(free=image * 21 // 20)  # timm has more biases
    monkeypatch.setattr("shutil.disk_usage", lambda folder: nearly_full)
    with pytest.raises(OSError, match="No space left on device for weights of"):
        export_run(world / "run", world / "no_room")
    assert not (world / "no_room").exists()
    export_run(world / "run", world / "image_alone", form="timm")


@pytest.mark.slow
def test_a_classifier_begins_at_the_image_encoder_of_a_run_or_of_its_export(world):
    classified = [
        (key, files | {"cls": b"%d" % (i % 6)}) for i, (key, files) in enumerate(pictures())
    ]
    build_shards(classified, world / "classified")
    (world / "classifier.yaml").write_text(CLASSIFIER)
    assert zeta("export", "run", "encoder", cwd=world).returncode == 0
    expected = load_pretrained(world / "encoder").state_dict()
    for source in ("run", "encoder"):
        settings = (f"run.dir=from_{source}", f"train.init_from={source}")
        done = zeta("train", "classifier.yaml", "data.shards=classified", *settings, cwd=world)
        assert done.returncode == 0, done.stderr + done.stdout
        said = f"initialised from {source} (train.init_from), except that head.weight"
        assert said in done.stdout
        weights = load_full_weights(world / f"from_{source}/checkpoints/step_00000001")
        assert set(weights) == set(expected)
        # As many classes as the embedding has numbers: its projection is no head for them.
        assert weights["head.weight"].shape == expected["head.weight"].shape
        assert not torch.equal(weights["head.weight"], expected["head.weight"])
        for name in expected:
            assert name.startswith("head.") or torch.equal(weights[name], expected[name]), name


def test_pictures_of_a_pack_are_named_by_caption_labels_or_label():
    pack = lane_pack(step=2, lane=0)
    pack = replace(pack, labels=torch.tensor([1, 0, -1, -1]))
    assert titles(pack, 2, ("cat", "dog"), "bytes") == ["dog", "cat"]
    assert titles(pack, 3, None, "bytes") == ["1", "0", "-"]
    several = replace(pack, label_sets=torch.tensor([[0, 1], [1, -1], [-1, -1], [-1, -1]]))
    assert titles(several, 3, ("cat", "dog"), "bytes") == ["cat, dog", "dog", "-"]
    partners, shares = torch.tensor([1, 0, -1, -1]), torch.tensor([0.75, 0.1, 1.0, 1.0])
    mixed = replace(pack, mixed_with=partners, own_shares=shares)
    assert titles(mixed, 3, ("cat", "dog"), "bytes") == ["dog 75%, cat", "dog 90%, cat", "-"]
    ids = torch.tensor(list(b"two, then three") + [0] * 5)
    written = replace(pack, text_ids=ids, text_lengths=(3, 12, 0, 0, 5))
    assert titles(written, 2, None, "bytes") == ["two", ", then three"]


@pytest.mark.slow
def test_a_report_of_an_image_text_run_is_written(world):
    report = zeta("report", "run", cwd=world)
    assert report.returncode == 0, report.stderr


def plan(world: Path, recipe: str, *changes: str) -> subprocess.CompletedProcess[str]:
    return zeta("data", "plan", recipe, *changes, cwd=world)


@pytest.mark.slow
def test_what_cannot_be_learned_from_is_said_at_the_start(world, tmp_path):
    fine = plan(world, "navit_l16_siglip", "data.shards=shards", "train.packs_per_step=2")
    assert fine.returncode == 0, fine.stderr
    png = next(pictures())[1]["png"]
    build_shards([(f"{i}", {"png": png, "cls": b"[0, 1]"}) for i in range(4)], tmp_path / "lists")
    build_shards([(f"{i}", {"png": png, "cls": b"1"}) for i in range(4)], tmp_path / "plain")
    for recipe, shards, classes, message in (
        ("siglip.yaml", "plain", "null", "none of the 4 images of data.shards has the caption"),
        ("first_run", "lists", "2", "set objective.kind=sigmoid"),
        ("siglip.yaml", "lists", "null", "has the caption that the objective needs"),
    ):
        refused = plan(
            world, recipe, f"data.shards={tmp_path / shards}", f"model.num_classes={classes}"
        )
        assert refused.returncode == 1
        assert message in refused.stderr


@pytest.mark.slow
def test_the_first_recipe_for_captions_needs_no_setting_but_the_shards(world: Path):
    settings = ("train.max_steps=2", "tracker.wandb.mode=disabled", "run.dir=first_pairs")
    done = train(world, "first_pairs", "data.val_shards=shards", *settings)
    assert done.returncode == 0, done.stderr + done.stdout
    assert metrics(world / "first_pairs")
