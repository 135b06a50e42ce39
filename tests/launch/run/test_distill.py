"""A run learns from a teacher on unlabelled shards, and its export is an encoder as any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.shards.build import build_shards
from launch.recipes.digits import CLASS_NAMES, render_split
from tests.launch.command_line import zeta
from tests.launch.tiny_export import write_export
from zeta.export.text_encoder import load_text_encoder
from zeta.models.config import load_pretrained
from zeta.run.directory import RunDir

SETTINGS = (
    *("data.shards=shards/bare", "data.val_shards=shards/val", "data.workers=0"),
    *("objective.kind=distill", "objective.label_smoothing=0", "data.drop.keep=true"),
    *("train.checkpoint_every=3", "train.log_every=3", "train.evaluate.every=6"),
    *("optim.schedule=constant", "optim.warmup_steps=1", "optim.warmup_share=0"),
    *("train.device=cpu", "train.dtype=fp32", "tracker.wandb.mode=disabled"),
)
TEACHER = "objective.distill.teacher=teacher"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with digits, teachers of another patch and width, and a run of 6 steps."""
    folder = tmp_path_factory.mktemp("distill")
    train = [sample for sample, _ in zip(render_split("train", seed=0), range(160), strict=False)]
    val = [sample for sample, _ in zip(render_split("val", seed=0), range(40), strict=False)]
    bare = [(key, {"jpg": files["jpg"]}) for key, files in train]
    build_shards(bare, folder / "shards/bare")
    build_shards(train, folder / "shards/train", class_names=CLASS_NAMES)
    build_shards(val, folder / "shards/val", class_names=CLASS_NAMES)
    for name, pool in (("teacher", "cls"), ("other", "mean")):
        write_export(folder / name, CLASS_NAMES, patch_size=12, dim=24, pool=pool)
    done = zeta("train", "demo", "run.dir=run", TEACHER, "train.max_steps=6", *SETTINGS, cwd=folder)
    assert done.returncode == 0, done.stderr + done.stdout
    exported = zeta("export", "run", "export", cwd=folder)
    assert exported.returncode == 0, exported.stderr
    return folder


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_loss_falls_and_is_measured_on_held_out_images(world: Path):
    lines = metrics(world / "run")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0]
    (scores,) = (line for line in lines if "val/loss" in line)
    parts = scores["val/pooled_loss"] + scores["val/token_loss"]
    assert scores["val/loss"] == pytest.approx(parts)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_as_if_it_had_not_stopped(world: Path):
    ranks = ("launch", "local", "demo", "--nproc", "2", "--max-restarts", "0")
    done = zeta(*ranks, "run.dir=two", TEACHER, "train.max_steps=3", *SETTINGS, cwd=world)
    assert done.returncode == 0, done.stderr + done.stdout
    (world / "teacher").rename(world / "moved")  # the folder may move; its weights are what counts
    try:
        moved = "objective.distill.teacher=moved"
        settings = ("run.dir=two", moved, "train.max_steps=6", *SETTINGS)
        done = zeta("train", "demo", *settings, cwd=world)
    finally:
        (world / "moved").rename(world / "teacher")
    assert done.returncode == 0, done.stderr + done.stdout
    assert zeta("export", "two", "two_export", cwd=world).returncode == 0
    one, two = (load_pretrained(world / name).state_dict() for name in ("export", "two_export"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_another_teacher_is_refused_on_resume_by_name(world: Path):
    other = "objective.distill.teacher=other"
    refused = zeta("train", "demo", "run.dir=run", other, "train.max_steps=9", *SETTINGS, cwd=world)
    assert refused.returncode == 93
    assert "objective.distill.teacher is not what the run in" in refused.stderr
    assert "Give the folder of before, or choose another run.dir" in refused.stderr
    newest = RunDir(world / "run").checkpoints / "step_00000006"
    saved = json.loads((newest / "trainer.json").read_text())
    assert len(saved["objective"]["objective.distill.teacher"]) == 64
    assert not any("teacher" in name for name in saved["parameters"])


@pytest.mark.slow
def test_the_export_holds_the_encoder_alone_and_serves_as_any_other(world: Path):
    names = set(load_file(world / "export/model.safetensors"))
    assert names == set(load_pretrained(world / "export").state_dict())
    assert not any("maps" in name or "teacher" in name for name in names)
    embedded = zeta("embed", "export", "shards/val", "embedded", cwd=world)
    assert embedded.returncode == 0, embedded.stderr
    parts = ("--knn", "shards/train", "--probe", "shards/train", "--json")
    evaluated = zeta("eval", "export", "shards/val", *parts, cwd=world)
    assert evaluated.returncode == 0, evaluated.stderr
    assert {"knn", "linear_probe"} <= set(json.loads(evaluated.stdout))
    quiet = ("data.workers=0", "tracker.wandb.mode=disabled", "train.max_steps=2")
    tuned = zeta("finetune", "export", "shards/train", "run.dir=tuned", *quiet, cwd=world)
    assert tuned.returncode == 0, tuned.stderr + tuned.stdout


@pytest.mark.slow
def test_a_dry_run_counts_the_teacher(world: Path):
    settings = ("run.dir=dry", TEACHER, "train.max_steps=6", *SETTINGS)
    done = zeta("train", "demo", *settings, "--dry-run", cwd=world)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "\nbeside  " in done.stdout
    assert "forward, backward and update on cpu: loss" in done.stdout


@pytest.mark.slow
def test_added_to_captions_the_export_has_its_text_encoder_and_no_map(world: Path):
    train = [sample for sample, _ in zip(render_split("train", seed=0), range(80), strict=False)]
    pairs = [(key, {"jpg": files["jpg"], "txt": b"digit " + files["cls"]}) for key, files in train]
    build_shards(pairs, world / "shards/pairs")
    text = ("dim=16", "depth=1", "heads=2", "mlp_dim=32")
    settings = [
        *SETTINGS,
        *("data.shards=shards/pairs", "data.val_shards=null", "objective.kind=siglip+distill"),
        *("objective.embed_dim=16", *(f"objective.text.{size}" for size in text)),
        *("run.dir=pairs", "train.max_steps=2", TEACHER),
    ]
    done = zeta("train", "demo", *settings, cwd=world)
    assert done.returncode == 0, done.stderr + done.stdout
    exported = zeta("export", "pairs", "pairs_export", cwd=world)
    assert exported.returncode == 0, exported.stderr
    assert not any("maps" in name for name in load_file(world / "pairs_export/text.safetensors"))
    assert load_text_encoder(world / "pairs_export")[0].head.out_features == 16


@pytest.mark.slow
def test_added_to_classes_the_export_classifies_as_it_did_in_training(world: Path):
    settings = [
        *SETTINGS,
        *("data.shards=shards/train", "objective.kind=softmax+distill", "run.dir=classes"),
        *("train.max_steps=6", "train.evaluate.every=6", TEACHER),
    ]
    done = zeta("train", "demo", *settings, cwd=world)
    assert done.returncode == 0, done.stderr + done.stdout
    (scores,) = (line for line in metrics(world / "classes") if "val/top1" in line)
    parts = scores["val/base_loss"], scores["val/distill_loss"]
    assert min(parts) > 0
    assert scores["val/loss"] == pytest.approx(sum(parts))
    assert any("train/base_loss" in line for line in metrics(world / "classes"))
    assert zeta("export", "classes", "classes_export", cwd=world).returncode == 0
    evaluated = zeta("eval", "classes_export", "shards/val", "--json", cwd=world)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["top1"] == pytest.approx(scores["val/top1"], abs=1e-6)
