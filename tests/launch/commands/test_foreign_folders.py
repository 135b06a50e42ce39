"""Faulty folders of published encoders: one message, the same from every command, nothing left."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.cli import entry_point
from tests.launch.photos import write_photos
from tests.zeta.models.published.encoders import encoder
from tests.zeta.models.published.test_timm_vit import FREE, change
from tests.zeta.models.published.test_timm_vit import saved as saved_timm
from tests.zeta.small_models import small
from tests.zeta.training import tiny_navit
from zeta.exit_codes import RunError
from zeta.export.saving import save_pretrained
from zeta.train.init_sources import check_initial_weights

COMMANDS = {
    "import": ("import", "theirs", "out"),
    "finetune": ("finetune", "theirs", "photos", "run.dir=run", "tracker.wandb.mode=disabled"),
    "embed": ("embed", "theirs", "photos", "features"),
    "eval": ("eval", "theirs", "photos", "--knn", "photos"),
    "predict": ("predict", "theirs", "photos"),
}
WEIGHTS = "model.safetensors"


def several_models(folder):
    shutil.copy(folder / WEIGHTS, folder / "other.safetensors")


def missing_shard(folder):
    names = sorted(load_file(folder / WEIGHTS))
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")


def pickles(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def newer_class(folder):
    config = json.loads((folder / "config.json").read_text())
    if "architecture" in config:
        change(folder, architecture="vit_of_tomorrow")
    else:
        change(folder, gate_of_tomorrow=3)


def integers(folder):
    weights = load_file(folder / WEIGHTS)
    name = next(n for n in weights if n.endswith(("fc1.weight", "up_proj.weight")))
    save_file(weights | {name: weights[name].to(torch.int8)}, folder / WEIGHTS)


def processor(**settings):
    def fault(folder):
        usual = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
        (folder / "preprocessor_config.json").write_text(json.dumps(usual | settings))

    return fault


def config_of(content):
    def fault(folder):
        (folder / "config.json").write_text(content)

    return fault


FAULTS = {
    "list": (config_of("[]"), "config.json is damaged: it holds no object; download it again"),
    "empty": (config_of("{}"), "config.json has no model_type, as of transformers, and no archit"),
    "several models": (several_models, "holds weights of several models"),
    "missing shard": (missing_shard, "lacks model-00002-of-00002.safetensors"),
    "pickles": (pickles, "has its weights as pickles (.bin), which zeta does not read"),
    "newer class": (newer_class, "of_tomorrow"),
    "integers": (integers, "is of type torch.int8: zeta reads fp32, fp16 and bf16"),
    "patch": (processor(patch_size=14), "cuts patches of 14 pixels, the model takes 8"),
    "mean": (processor(image_mean=[0.4] * 4), "but the model takes 3 channels"),
    "std": (processor(image_std=[0.2, 0.2, 0]), "it must be positive"),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder / "photos", 2, seed=0)
    return folder / "photos"


@pytest.mark.parametrize("kind", ["transformers", "timm"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_command_refuses_a_faulty_folder_alike_and_leaves_nothing(
    tmp_path, photos, monkeypatch, capsys, fault, kind
):
    theirs = tmp_path / "theirs"
    if kind == "timm":
        saved_timm(theirs, "vit_base_patch16_224", **FREE)
    else:
        encoder("dinov3").save_pretrained(theirs)
    damage, message = FAULTS[fault]
    damage(theirs)
    (tmp_path / "photos").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    said = {}
    for name, command in COMMANDS.items():
        assert entry_point(list(command)) != 0, name
        said[name] = capsys.readouterr().err.strip()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "theirs"], name
    (only,) = set(said.values())
    assert message in only
    assert "theirs" in only
    assert len(only.splitlines()) == 1
    with pytest.raises(RunError) as refused:
        check_initial_weights(tiny_navit(), str(theirs))
    assert message in str(refused.value)


@pytest.mark.parametrize("kind", ["timm", "export"])
@pytest.mark.parametrize("channels", [1, 6])
def test_commands_that_read_images_refuse_a_model_of_other_channels_alike(
    tmp_path, photos, monkeypatch, capsys, kind, channels
):
    theirs = tmp_path / "theirs"
    if kind == "timm":
        saved_timm(theirs, "vit_base_patch16_224", **FREE, in_chans=channels)
        change(theirs, pretrained_cfg={"mean": [0.5] * channels, "std": [0.5] * channels})
    else:
        model, arguments = small(channels=channels)
        save_pretrained(theirs, model.state_dict(), arguments, {})
    (tmp_path / "photos").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    for name in ("finetune", "embed", "eval", "predict"):
        assert entry_point(list(COMMANDS[name])) != 0, name
        said = capsys.readouterr().err.strip()
        assert f"theirs takes images of {channels} channels, but images are read as RGB" in said
        assert len(said.splitlines()) == 1, name
        assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "theirs"], name


def test_weights_of_several_float_types_are_kept_and_said(tmp_path, capsys):
    theirs = tmp_path / "theirs"
    encoder("dinov3").save_pretrained(theirs)
    weights = load_file(theirs / WEIGHTS)
    name = next(n for n in weights if n.endswith("up_proj.weight"))
    save_file(weights | {name: weights[name].bfloat16()}, theirs / WEIGHTS)
    assert entry_point(["import", str(theirs), str(tmp_path / "out")]) == 0
    assert "weights of several types, kept as they are: bfloat16, float32" in (
        capsys.readouterr().out
    )
