"""Shards to training to export to evaluation, through the command line, on a small world."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.config import DataConfig
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.manifest import Manifest
from launch.config.resolve import data_for_model
from launch.evaluate.scores import evaluate_plan
from launch.recipes.digits import CLASS_NAMES, render_split
from launch.run.evaluation_plan import held_out_plan, view_at
from tests.launch.command_line import zeta
from zeta.checkpoint.directory import load_full_weights
from zeta.models.config import load_pretrained
from zeta.models.exported import read_config
from zeta.objectives import build_objective
from zeta.objectives.config import ObjectiveConfig

SETTINGS = (
    "train.max_steps=6",
    "optim.warmup_steps=1",
    "train.checkpoint_every=3",
    "train.log_every=2",
    "tracker.wandb.mode=disabled",
    "data.workers=0",
    "train.ema_decay=0.9",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards/train, shards/val and a finished run on one rank with its export."""
    folder = tmp_path_factory.mktemp("job")
    for split in ("train", "val"):
        samples = render_split(split, seed=0)
        some = [next(samples) for _ in range(120)]
        build_shards(some, folder / "shards" / split, max_count=50, class_names=CLASS_NAMES)
    done = zeta(
        *("train", "demo", "data.shards=shards/train", "run.dir=run", *SETTINGS),
        *("data.val_shards=shards/val", "train.evaluate.every=4", "train.evaluate.tokens=[16,40]"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "zeta: finished at step " in done.stdout
    assert zeta("export", "run", "export", cwd=folder).returncode == 0
    return folder


def train_again(world: Path, *changes: str) -> subprocess.CompletedProcess[str]:
    return zeta(
        "train", "demo", "data.shards=shards/train", "run.dir=run", *SETTINGS, *changes, cwd=world
    )


@pytest.mark.slow
def test_a_run_directory_describes_its_run(world: Path):
    lines = [json.loads(line) for line in (world / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6]
    assert (world / "run/FINISHED").exists()
    assert "packs_per_step: 2" in (world / "run/config.yaml").read_text()
    assert json.loads((world / "run/classes.json").read_text()) == list(CLASS_NAMES)
    assert {path.name for path in (world / "run/checkpoints").iterdir()} == {
        "step_00000003",
        "step_00000006",
        "latest",
    }


@pytest.mark.slow
def test_a_changed_fixed_field_is_refused_by_name_and_a_free_one_is_not(world: Path):
    refused = train_again(world, "optim.lr=0.5", "data.seed=9")
    assert refused.returncode == 93
    assert "data.seed was 0 and is now 9; optim.lr was 0.002 and is now 0.5" in refused.stderr
    assert "Traceback" not in refused.stderr
    accepted = train_again(world, "train.log_every=1", "data.workers=1")
    assert accepted.returncode == 0, accepted.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("train.packs_per_step=500",), "the shards hold only 120 usable images"),
        (("data.shards=nowhere",), "no shard matches nowhere"),
        (("data.token_budget=0",), "data.token_budget is 0; it must be at least 1"),
        (
            ("model.num_classes=3",),
            "model.num_classes is 3, but the class map of the shards has 10",
        ),
        (("model.preset=vit_b",), "model.preset is 'vit_b'; choose one of"),
        (("train.colour=red",), "train.colour"),
    ],
)
def test_a_config_that_cannot_work_exits_93_with_one_message(world: Path, settings, message):
    refused = zeta(
        "train",
        "demo",
        "data.shards=shards/train",
        "run.dir=other",
        *SETTINGS,
        *settings,
        cwd=world,
    )
    assert refused.returncode == 93
    assert message in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not (world / "other").exists()


@pytest.mark.slow
def test_the_export_evaluates_and_its_numbers_are_json(world: Path):
    done = zeta("eval", "export", "shards/val", "--resolutions", "native,48", "--json", cwd=world)
    result = json.loads(done.stdout)
    assert set(result) >= {"top1", "top5", "by_resolution"}
    assert result["by_resolution"]["48"]["images"] == 120
    assert 0 <= result["top1"] <= result["top5"] <= 1


@pytest.mark.slow
def test_training_and_the_evaluation_of_its_export_give_the_same_numbers(world: Path):
    lines = map(json.loads, (world / "run/metrics.jsonl").read_text().splitlines())
    trained = {line["step"]: line for line in lines if "val/loss" in line}
    assert list(trained) == [4, 6]
    assert trained[6]["val/images"] == 120
    assert trained[6]["val/rejected"] == 0
    # The demo draws sides of up to 96 pixels in patches of 8: 144 tokens.
    sizes = ("--resolutions", "train", "--tokens", "144,16,40")
    done = zeta("eval", "export", "shards/val", *sizes, "--json", cwd=world)
    result = json.loads(done.stdout)
    scored = {**result["by_resolution"], **result["by_tokens"]}
    suffixes = {"train": "", "144": "", "16": "_at_16_tokens", "40": "_at_40_tokens"}
    for size, suffix in suffixes.items():
        for score in ("loss", "top1", "top5"):
            ours = trained[6][f"val/{score}{suffix}"]
            assert scored[size][score] == pytest.approx(ours, abs=1e-6), (size, score)
    assert scored["16"]["loss"] != pytest.approx(scored["144"]["loss"], abs=1e-5)
    by_default = json.loads(zeta("eval", "export", "shards/val", "--json", cwd=world).stdout)
    assert by_default["loss"] == result["loss"] == pytest.approx(trained[6]["val/loss"], abs=1e-6)
    assert by_default["size"] == "each image at up to the area of 96 x 96 pixels"
    card = (world / "export/README.md").read_text()
    assert "each image at up to the area of 96 x 96 pixels, the largest of training" in card


@pytest.mark.slow
def test_an_evaluation_does_not_depend_on_how_images_are_packed(world: Path):
    model = load_pretrained(world / "export")
    manifest = Manifest.open(str(world / "shards/val"))
    arguments = read_config(world / "export")["model"]
    objective = build_objective(ObjectiveConfig(), 10)
    view = view_at("native", arguments, {})
    results = []
    for budget, images, lanes in ((4096, 256, 1), (200, 1, 1), (300, 9, 7)):
        data = DataConfig(token_budget=budget, max_images_per_pack=images, workers=0)
        data = data_for_model(data, arguments)
        plan = held_out_plan(manifest, data, view, num_lanes=lanes)
        results.append(evaluate_plan(model, objective, plan, torch.device("cpu"), range(10)))
    for result in results[1:]:
        assert vars(result) == pytest.approx(vars(results[0]), rel=1e-6)


@pytest.mark.slow
def test_shards_with_a_class_that_the_model_does_not_know_are_refused(world: Path, tmp_path: Path):
    samples = list(render_split("val", seed=0))[:20]
    build_shards(samples, tmp_path / "other", class_names=["zero", *CLASS_NAMES[1:]])
    done = zeta("eval", "export", str(tmp_path / "other"), cwd=world)
    assert done.returncode == 1
    assert "class 'zero' of the shards is none of the export's 10 classes" in done.stderr


@pytest.mark.slow
def test_held_out_shards_may_lack_classes_and_number_them_differently(world: Path, tmp_path: Path):
    samples = [(key, files) for key, files in render_split("val", seed=0) if files["cls"] in b"27"]
    build_shards(samples, tmp_path / "whole", class_names=CLASS_NAMES)
    renumbered = [(k, f | {"cls": {b"2": b"1", b"7": b"0"}[f["cls"]]}) for k, f in samples]
    build_shards(renumbered, tmp_path / "part", class_names=["7", "2"])
    results = [
        json.loads(zeta("eval", "export", str(tmp_path / name), "--json", cwd=world).stdout)
        for name in ("whole", "part")
    ]
    assert results[0] == results[1]


@pytest.mark.slow
def test_a_start_that_failed_does_not_fix_the_config_of_its_directory(world: Path):
    settings = ("data.shards=shards/train", "run.dir=fails", *SETTINGS)
    refused = zeta("train", "demo", *settings, "model.heads=3", "model.dim_head=0", cwd=world)
    assert refused.returncode == 93
    assert zeta("train", "demo", *settings, "train.max_steps=2", cwd=world).returncode == 0


@pytest.mark.slow
def test_a_folder_with_something_else_is_no_run_directory(world: Path, tmp_path: Path):
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    settings = ("data.shards=shards/train", f"run.dir={tmp_path}", *SETTINGS)
    refused = zeta("train", "demo", *settings, cwd=world)
    assert refused.returncode == 93
    assert (
        "contains 'holiday.jpg' and is not a run directory; choose a new or empty folder"
        in refused.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


@pytest.mark.slow
def test_images_without_classes_are_refused_with_what_to_do(world: Path, tmp_path: Path):
    samples = [(k, {"jpg": f["jpg"]}) for k, f in list(render_split("val", seed=0))[:9]]
    build_shards(samples, tmp_path / "flat")
    settings = (f"data.shards={tmp_path / 'flat'}", f"run.dir={tmp_path / 'run'}", *SETTINGS)
    refused = zeta("train", "demo", *settings, cwd=world)
    assert refused.returncode == 93
    assert "put the images into one folder a class" in refused.stderr
    refused = zeta("eval", "export", str(tmp_path / "flat"), cwd=world)
    assert refused.returncode == 1
    assert "has a class label to compare with" in refused.stderr


@pytest.mark.slow
def test_a_resolution_beyond_any_memory_is_refused(world: Path):
    refused = zeta("eval", "export", "shards/val", "--resolutions", "999999", cwd=world)
    assert refused.returncode == 1
    assert "an evaluation takes at most 131,072 an image" in refused.stderr


@pytest.mark.slow
def test_the_folder_it_is_started_from_cannot_stand_in_for_zeta(world: Path, tmp_path: Path):
    (tmp_path / "launch.py").write_text("print('not zeta')")
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("zeta")),
            *("launch", "local", "demo", "--nproc", "2"),
            *(f"data.shards={world / 'shards/train'}", "run.dir=run"),
            *SETTINGS,
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/FINISHED").exists()


@pytest.mark.slow
def test_the_moving_average_is_exported_on_request_and_evaluates(world: Path):
    assert zeta("export", "run", "averaged", "--ema", cwd=world).returncode == 0
    average = load_pretrained(world / "averaged").state_dict()
    checkpoint = world / "run" / "checkpoints" / "step_00000006"
    for name, value in load_full_weights(checkpoint, average=True).items():
        assert torch.equal(average[name], value)
    last = load_pretrained(world / "export").state_dict()
    assert not torch.equal(average["head.weight"], last["head.weight"])
    assert read_config(world / "averaged")["info"]["weights"] == "moving average"
    assert zeta("eval", "averaged", "shards/val", cwd=world).returncode == 0


@pytest.mark.slow
def test_a_damaged_checkpoint_is_never_exported(world: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    damaged = next((run / "checkpoints/step_00000006/zero").glob("*.pt"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert zeta("export", str(run), str(tmp_path / "out"), cwd=tmp_path).returncode == 0
    info = json.loads((tmp_path / "out/config.json").read_text())["info"]
    assert info["step"] == 3
    refused = zeta("export", str(run), str(tmp_path / "new"), "--step", "6", cwd=tmp_path)
    assert refused.returncode == 1
    assert "no whole checkpoint" in refused.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "nowhere", "out"), "nowhere does not exist; give the directory of a run"),
        (("eval", "nowhere", "shards"), "nowhere does not exist; give a folder"),
        (("report", "nowhere"), "nowhere"),
        (("data", "plan", "nosuch"), "no config 'nosuch'"),
        (("shards", "build", "nowhere", "out"), "nowhere"),
        (("shards", "index", "nowhere"), "no shard matches nowhere"),
    ],
)
def test_missing_folders_are_one_message_without_traceback(tmp_path: Path, arguments, message):
    done = zeta(*arguments, cwd=tmp_path)
    assert done.returncode not in (0, None)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_timm_export_gives_the_logits_of_the_zeta_export(world: Path):
    timm = pytest.importorskip("timm")
    assert zeta("export", "run", "for_timm", "--format", "timm", cwd=world).returncode == 0
    ours = load_pretrained(world / "export")
    theirs = timm.create_model(f"local-dir:{world / 'for_timm'}", pretrained=True).eval()
    with torch.no_grad():
        for height, width in ((48, 48), (24, 96), (136, 40)):
            image = torch.randn(3, height, width)
            expected = ours([image])
            assert torch.allclose(theirs(image[None]), expected, atol=1e-4)


MEGAVIT = (
    "model.arch=megavit",
    "model.image_size=32",
    "data.resolution.kind=fixed",
    "data.resolution.max=32",
    "data.drop.kind=none",
    "data.token_budget=170",  # ten images of 16 patches and a class token
    "model.dim_head=8",  # no words for this in timm
)


@pytest.mark.slow
def test_a_megavit_trains_in_the_same_loop_from_the_same_shards(world: Path) -> None:
    run = ("train", "demo", "data.shards=shards/train", "run.dir=mega", *SETTINGS, *MEGAVIT)
    refused = zeta(*run, "data.resolution.fit=keep", cwd=world)
    assert refused.returncode != 0
    assert "data.resolution.fit=crop (or squash)" in refused.stderr + refused.stdout
    done = zeta(*run, "data.resolution.fit=squash", "train.zero_stage=3", cwd=world)
    assert done.returncode == 0, done.stderr + done.stdout
    said = " ".join((done.stdout + done.stderr).split())
    warning = (
        "WARNING: `zeta export --format timm` will refuse this model: model.heads x model.dim_head"
    )
    assert said.count(warning) == 1
    refused = zeta("export", "mega", "mega_timm", "--format", "both", cwd=world)
    assert refused.returncode == 1
    assert "model.heads x model.dim_head is" in refused.stderr
    assert not (world / "mega_timm").exists()
    lines = map(json.loads, (world / "mega/metrics.jsonl").read_text().splitlines())
    assert {line["data/fill"] for line in lines if "data/fill" in line} == {1}
    assert zeta("export", "mega", "mega_export", cwd=world).returncode == 0
    scored = zeta("eval", "mega_export", "shards/val", "--json", cwd=world)
    assert json.loads(scored.stdout)["by_resolution"]["train"]["images"] == 120
