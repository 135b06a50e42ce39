"""`zeta finetune`: from an export and a folder of images to a model of its classes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from data_pipeline.shards.build import build_split
from launch.config.load import DEFAULT, read_settings
from launch.evaluate.requests import Request, prepare
from launch.evaluate.scores import evaluate_export, run_evaluation
from launch.recipes.finetune import finetune
from launch.recipes.finetune_images import find_images
from launch.recipes.finetune_recipe import (
    compose,
    open_export,
    recipe_settings,
    settings_of_export,
    settings_of_images,
)
from tests.launch.command_line import zeta
from tests.launch.photos import CLASSES, write_photos
from tests.launch.tiny_export import write_export
from zeta.checkpoint.directory import load_full_weights
from zeta.distributed import RankInfo, World
from zeta.exit_codes import ExitCode, RunError
from zeta.models.config import load_pretrained
from zeta.models.exported import read_config
from zeta.run.directory import RunDir

SHELL_OF_SRUN = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_STEP_NODELIST": "localhost",
}  # fmt: skip
"""As in the shell that `srun --ntasks=4 --pty bash` opens."""
QUIET = ("tracker.wandb.mode=disabled", "data.workers=0", "train.log_every=1")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export of other classes, and photos of three."""
    folder = tmp_path_factory.mktemp("finetune")
    write_export(folder / "export", ["left", "right"])
    write_photos(folder / "photos", 12, seed=0)
    return folder


@pytest.fixture(scope="module")
def tuned(world: Path) -> Path:
    """The run directory of the last block, trained on two ranks from the photos alone."""
    command = ("finetune", "export", "photos", "--mode", "last-1", "--nproc", "2")
    done = zeta(*command, "run.dir=run", "train.max_steps=4", "optim.lr=0.01", *QUIET, cwd=world)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-out top-1: " in done.stdout
    assert "its head is new" in done.stdout
    assert "has a side shorter than a patch of 8 pixels" in done.stderr
    assert "skipped 1: not an image by its name (.txt)" in done.stderr
    return world / "run"


@pytest.mark.slow
def test_a_folder_of_images_becomes_a_run_and_a_model_of_its_classes(world: Path, tuned: Path):
    assert (tuned / "FINISHED").read_text() == "step 4\n"
    record = json.loads((tuned / "finetune.json").read_text())
    metrics = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    (held_out,) = [line for line in metrics if "val/top1" in line]
    assert record["after"]["top1"] == held_out["val/top1"]
    assert record["before"]["images"] == record["after"]["images"] == held_out["val/images"] > 1
    assert record["before"]["loss"] == pytest.approx(torch.log(torch.tensor(3.0)).item())
    config = read_config(tuned / "export")
    assert config["info"]["class_names"] == sorted(CLASSES)
    assert config["model"]["num_classes"] == 3
    began_at = load_pretrained(world / "export").state_dict()
    for name, value in load_full_weights(tuned / "checkpoints/step_00000004").items():
        still = name.startswith(("embeds.", "blocks.0.")) or name in ("mean", "std")
        if not name.startswith("head."):
            assert torch.equal(value, began_at[name]) == still, name
    trained = yaml.safe_load((tuned / "config.yaml").read_text())
    assert trained["train"]["trainable"] == "last-1"
    assert trained["optim"]["layer_decay"] == 0.9


@pytest.mark.slow
def test_the_same_command_goes_on_and_another_mode_is_another_run(world: Path, tuned: Path):
    command = ("finetune", "export", "photos", "run.dir=run", "optim.lr=0.01", *QUIET)
    more = zeta(*command, "--mode", "last-1", "train.max_steps=6", cwd=world)
    assert more.returncode == 0, more.stdout + more.stderr
    assert (tuned / "FINISHED").read_text() == "step 6\n"
    assert "continuing from step_00000004" in (tuned / "logs/rank_00000.log").read_text()
    other = zeta(*command, "train.trainable=head", "train.max_steps=6", cwd=world)
    assert other.returncode == 93
    assert "train.trainable was 'last-1' and is now 'head'" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.slow
def test_shards_and_a_config_of_ones_own_keep_the_head_of_the_same_classes(
    world: Path, tuned: Path
):
    names = sorted(CLASSES)
    write_export(world / "same", names)
    recipe = {"data": {"shards": "run/shards/train", "val_shards": "run/shards/val"}}
    recipe |= {"train": {"max_steps": 2}, "optim": {"schedule": "constant", "lr": 0.0}}
    (world / "own.yaml").write_text(yaml.safe_dump(recipe))
    done = zeta("finetune", "same", "own.yaml", "run.dir=kept", *QUIET, cwd=world)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "its head is new" not in done.stdout
    weights = load_full_weights(world / "kept/checkpoints/step_00000002")
    for name, value in load_pretrained(world / "same").state_dict().items():
        assert torch.equal(weights[name], value), name  # at a rate of 0
    record = json.loads((world / "kept/finetune.json").read_text())
    for score, value in record["after"].items():
        assert record["before"][score] == pytest.approx(value, rel=1e-5), score


def test_a_probe_is_the_classifier_of_eval_and_takes_no_steps(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "probe"
    settings = [f"run.dir={run}", "data.workers=0"]
    assert finetune(world / "export", str(world / "photos"), settings, mode="probe") == 0
    with pytest.raises(ValueError, match="holds a model already: choose another directory"):
        finetune(world / "export", str(world / "photos"), settings, mode="probe")
    said = capsys.readouterr().out
    record = json.loads((run / "finetune.json").read_text())
    assert f"before (its head is new: chance), {record['after']['top1']:.2%} after" in said
    assert not RunDir(run).config.exists()
    shards = [str(run / "shards" / part) for part in ("train", "val")]
    fitted = Request(world / "export", shards[1], probe=[shards[0]], workers=0)
    found = run_evaluation(prepare(fitted), World(RankInfo(), torch.device("cpu")))
    assert record["after"]["top1"] == found["linear_probe"]["top1"]
    model = load_pretrained(run / "export")
    assert model.class_names == tuple(sorted(CLASSES))
    scored = evaluate_export(run / "export", shards[1], ["train"], workers=0)
    assert {name: scored[name] for name in record["after"]} == pytest.approx(record["after"])
    for name, value in load_pretrained(world / "export").state_dict().items():
        assert name.startswith("head.") or torch.equal(model.state_dict()[name], value), name


def test_a_probe_keeps_to_one_process_and_away_from_runs(world: Path, tmp_path: Path):
    words = (world / "export", str(world / "photos"), [f"run.dir={tmp_path}"])
    with pytest.raises(ValueError, match="one process, and 2 ranks are asked for: start it alone"):
        finetune(*words, mode="probe", nproc=2)
    RunDir(tmp_path).config.write_text("")
    with pytest.raises(ValueError, match="holds a run that was trained by steps: choose another"):
        finetune(*words, mode="probe")


def test_classes_that_are_held_out_but_not_trained_on_are_named(world: Path, tmp_path: Path):
    for part, images in (("train", 3), ("val", 1)):
        write_photos(tmp_path / "sets" / part, images, seed=1)
    (tmp_path / "sets/val/zebra").rename(tmp_path / "sets/val/horse")
    with pytest.raises(ValueError, match=r"data.val_shards: class 'horse' of the shards is none"):
        finetune(world / "export", str(tmp_path / "sets"), [f"run.dir={tmp_path / 'run'}"])


@pytest.mark.parametrize(
    ("source", "settings", "mode", "message"),
    [
        ("nowhere/photos", (), None, "nowhere/photos does not exist; give a folder of images"),
        ("nosuch", (), None, "no config 'nosuch'"),
        ("flat", (), None, "flat have no classes: put them into one folder a class"),
        ("text", (), None, r"no images found in .*text.*not an image by its name"),
        ("tiny", (), None, "all 3 images have a side shorter than a patch of 8"),
        ("photos", (), "tail", "--mode is 'tail'; choose full, probe"),
        ("photos", (), "last-0", "train.trainable is 'last-0'"),
        ("photos", (), "last-9", "train.trainable is last-9, but the model has 2 blocks"),
        ("photos", ("train.trainable=all",), "probe", "--mode is probe, but train.trainable is"),
        ("photos", ("optim.lr=1",), "probe", "computed once, so optim.lr has no use: leave it out"),
        ("photos", ("train.init_from=x",), None, "train.init_from is x, but the run begins at"),
        ("photos", ("model.dim=64",), None, "model.dim is 64, but .*export is a model with dim"),
        ("photos", ("model.preset=navit_b16",), None, "model.image_size is 256, but"),
        ("photos", ("optim.colour=1",), None, "optim.colour"),
    ],
)
def test_what_cannot_work_is_one_message_and_leaves_nothing_behind(
    world: Path, tmp_path: Path, source: str, settings: tuple[str, ...], mode: str, message: str
):
    from PIL import Image

    (tmp_path / "flat").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "flat/a.png")
    (tmp_path / "text/a").mkdir(parents=True)
    (tmp_path / "text/a/notes.txt").write_text("no image")
    for index in range(4):
        folder = tmp_path / f"tiny/{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 30 + index)).save(folder / f"{index}.png")
    here = tmp_path if source in ("flat", "text", "tiny") else world
    where = source if source == "nosuch" else str(here / source)
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        finetune(world / "export", where, [f"run.dir={run}", *settings], mode=mode)
    assert not run.exists()


def write_unusable(root: Path) -> Path:
    """Images of two classes that only decoding shows to be cut off."""
    from PIL import Image

    for index in range(6):
        folder = root / f"{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{index}.png"
        Image.effect_noise((40 + index, 40), 50).save(path)
        os.truncate(path, path.stat().st_size // 2)
    return root


def test_images_that_cannot_be_decoded_leave_nothing_for_the_next_try(world: Path, tmp_path: Path):
    run = [f"run.dir={tmp_path / 'run'}", *QUIET]
    with pytest.raises(RunError, match="none of the 1 held-out images could be used"):
        finetune(world / "export", str(write_unusable(tmp_path / "cut")), run)
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_a_refused_run_leaves_what_was_there_before(world: Path, tmp_path: Path):
    run = tmp_path / "run"
    build_split(str(world / "photos"), run / "shards", 0.1)
    before = sorted(run.rglob("*"))
    with pytest.raises(ValueError, match=r"data.token_budget is 2, but"):
        finetune(
            world / "export",
            str(world / "photos"),
            [f"run.dir={run}", "data.token_budget=2", *QUIET],
        )
    assert sorted(run.rglob("*")) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"which contains 'thesis.tex' and is not a run directory"):
        finetune(world / "export", str(world / "photos"), [f"run.dir={tmp_path / 'mine'}"])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_other_images_never_go_on_with_the_shards_of_those_before(world: Path, tmp_path: Path):
    write_photos(tmp_path / "my dogs", 3, seed=1)
    run = tmp_path / "run"
    build_split(str(world / "photos"), run / "shards", 0.1)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(ValueError, match=r"is a run on other images than .*my dogs, or on") as e:
        finetune(world / "export", str(tmp_path / "my dogs"), [f"run.dir={run}", *QUIET])
    assert f"as in 'run.dir={run}-my dogs', or delete {run}" in str(e.value)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_scores_before_training_are_those_of_the_images_that_are_trained_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("launch.recipes.finetune.train", lambda config: ExitCode.REQUEUE)  # no step
    before = []
    for images in (8, 4):
        write_photos(tmp_path / str(images), images, seed=images)
        build_split(str(tmp_path / str(images)), tmp_path / f"shards{images}", 0.3)
        shards = tmp_path / f"shards{images}"
        given = [f"run.dir={tmp_path / 'run'}", f"data.val_shards={shards}/val", *QUIET]
        assert finetune(world / "export", str(shards / "train"), given) == ExitCode.REQUEUE
        before.append(json.loads((tmp_path / "run/finetune.json").read_text())["before"])
    assert before[0]["images"] > before[1]["images"] > 0


def test_a_folder_that_is_no_export_is_refused(world: Path):
    with pytest.raises(ValueError, match=r"photos is not an export: it has no config.json"):
        finetune(world / "photos", str(world / "photos"), [])


def test_an_export_whose_weights_are_cut_is_refused_before_shards_are_made(world, tmp_path):
    shutil.copytree(world / "export", tmp_path / "export")
    weights = tmp_path / "export/model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(ValueError, match="export is not a whole export"):
        finetune(tmp_path / "export", str(world / "photos"), [f"run.dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_modes_set_what_learns_and_the_user_has_the_last_word(world: Path):
    export = open_export(world / "export")
    user = [("in own.yaml", "data.shards", "x"), ("in own.yaml", "train.max_steps", 10)]

    def config(mode: str | None, *more: tuple[str, str, object]):
        base = [*settings_of_export(export), *recipe_settings(mode)]
        return compose(export, base, [*user, *more], mode)

    assert config(None).train.trainable == config("full").train.trainable == "all"
    assert config("full").optim.layer_decay < 1
    probe = config("probe")
    assert (probe.train.trainable, probe.optim.layer_decay) == ("head", 1.0)
    assert config("last-1").train.trainable == "last-1"
    assert (config("full").optim.lr, probe.optim.lr) == (1.5e-3, 1e-2)  # 3e-4 at 768 channels
    chosen = config("probe", ("on the command line", "optim.lr", 0.5))
    assert chosen.optim.lr == 0.5
    fixed = [("", "data.resolution.kind", "fixed"), ("", "data.resolution.max", 32)]
    resolution = config(None, *fixed).data.resolution
    assert (resolution.kind, resolution.max) == ("fixed", 32)
    assert config(None).data.resolution.kind == "side"
    assert config(None).model.dim == 32


def test_a_model_of_one_size_is_shown_images_of_that_size(tmp_path: Path):
    path = write_export(tmp_path / "mega", ["a", "b"], arch="megavit")
    export = open_export(path)
    user = [("", "data.shards", "x"), ("", "train.max_steps", 10)]
    base = [*settings_of_export(export), *recipe_settings(None)]
    data = compose(export, base, user, None).data
    assert (data.resolution.kind, data.resolution.max) == ("fixed", 48)
    assert data.token_budget == 8 * (36 + 1)  # 6 x 6 patches and the class token


@pytest.mark.slow
def test_the_length_of_a_run_follows_the_images_unless_it_is_set(tuned: Path):
    shards = str(tuned / "shards/train")

    def length(*user: tuple[str, str, object]) -> dict[str, object]:
        return {key: value for _, key, value in settings_of_images(shards, user)}

    found = length()
    assert found["train.max_images"] == 20_000  # 20 epochs of some 30 images would be too few
    assert found["optim.schedule_by"] == "images"
    epochs = length(("", "train.max_epochs", 3))["train.max_images"]
    assert epochs % 3 == 0
    assert epochs < 200
    steps = length(("", "train.max_steps", 100))
    assert "train.max_images" not in steps
    assert "optim.schedule_by" not in steps
    for unit in ("images", "tokens"):
        limited = length(("", f"train.max_{unit}", 10_000))
        assert limited["optim.schedule_by"] == unit
        assert "train.max_images" not in limited


def test_folders_tables_shards_and_configs_are_told_apart(tmp_path: Path):
    for name in ("images/cat", "images/dog", "sets/train/cat", "sets/val/cat", "classes/train"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "classes/test").mkdir()
    for name in ("shards/a.tar", "split/train/a.tar", "split/val/a.tar", "images/cat/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "own.yaml").write_text("{}")

    def found(name: str) -> tuple[str, str | None, bool] | None:
        images = find_images(str(tmp_path / name))
        if images is None:
            return None
        val = images.val and Path(images.val).relative_to(tmp_path).as_posix()
        return Path(images.train).relative_to(tmp_path).as_posix(), val, images.are_shards

    assert found("images") == ("images", None, False)
    assert found("sets") == ("sets/train", "sets/val", False)
    assert found("classes") == ("classes", None, False)  # train and test are its classes
    assert found("shards") == ("shards", None, True)
    assert found("split") == ("split/train", "split/val", True)
    assert found("shards/a.tar") == ("shards/a.tar", None, True)
    assert found("own.yaml") is None
    assert find_images("navit_b16_classification") is None
    assert all(source == DEFAULT for source, _, _ in recipe_settings("probe"))
    assert read_settings(str(tmp_path / "own.yaml")) == [(DEFAULT, "run.name", "own")]


def test_as_one_of_several_ranks_it_takes_shards_and_starts_no_ranks_itself(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    run = f"run.dir={tmp_path / 'run'}"
    with pytest.raises(ValueError, match="holds images, and several ranks are running: build"):
        finetune(world / "export", str(world / "photos"), [run])
    with pytest.raises(ValueError, match="--nproc starts ranks, and this is already one"):
        finetune(world / "export", str(world / "photos"), [run], nproc=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_in_a_shell_of_srun_its_own_ranks_are_a_world_of_their_own(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in SHELL_OF_SRUN.items():
        monkeypatch.setenv(name, value)
    command = ("finetune", world / "export", world / "photos", "--nproc", "2")
    settings = (f"run.dir={tmp_path / 'run'}", "train.max_steps=2", "optim.lr=0.01", *QUIET)
    done = zeta(*map(str, command), *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/FINISHED").read_text() == "step 2\n"
