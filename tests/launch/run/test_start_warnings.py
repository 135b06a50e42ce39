"""What a run can do, but not as one may think, is said by name when it starts and in a dry run."""

from __future__ import annotations

import pytest

from data_pipeline.shards.build import build_shards
from launch.config.load import load_config
from launch.run.checks import check_start
from launch.run.start_warnings import start_warnings
from tests.data_pipeline.shard_fixtures import jpeg

LEJEPA = ("objective.kind=lejepa", "objective.label_smoothing=0", "data.views=2")


def build(folder, count, first):
    samples = []
    for i in range(first, first + count):
        files = {"jpg": jpeg(24, 24, i)} | {"cls": str(i % 2).encode()}
        samples.append((f"s{i}", files))
    build_shards(samples, folder, max_count=100, class_names=["a", "b"])
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards by name: 80 images, 40 and 7 held-out ones, and one image."""
    folder = tmp_path_factory.mktemp("shards")
    for number, (name, count) in enumerate({"train": 80, "val": 40, "few": 7, "one": 1}.items()):
        build(folder / name, count, 1000 * number)
    return folder


def said(shards, tmp_path, *settings, data="train"):
    """The warnings of a run, without those of export formats."""
    given = (f"data.shards={shards / data}", f"run.dir={tmp_path / 'run'}", *settings)
    config = load_config("demo", [text.replace("SHARDS", str(shards)) for text in given])
    return [text for text in start_warnings(check_start(config, 1)) if "zeta export" not in text]


def test_a_usual_run_is_warned_of_nothing(shards, tmp_path):
    assert said(shards, tmp_path, "data.val_shards=SHARDS/val") == []
    assert said(shards, tmp_path, "data.val_shards=SHARDS/val", *LEJEPA) == []


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        (
            ("data.probe_val_shards=SHARDS/val",),
            "data.probe_val_shards is set, but nothing reads it",
        ),
        (
            ("data.probe_shards=SHARDS/train", "data.probe_val_shards=SHARDS/val"),
            "data.probe_shards and data.probe_val_shards are set, but nothing reads them",
        ),
    ],
)
def test_shards_of_a_probe_that_is_not_asked_for_are_said(shards, tmp_path, settings, start):
    (warning,) = said(shards, tmp_path, *settings)
    assert warning == f"{start}: set train.evaluate.knn=true or train.evaluate.probe=true"
    assert said(shards, tmp_path, *settings[-1:], "train.evaluate.probe=true") == []


@pytest.mark.parametrize(
    ("classifiers", "words"),
    [
        (("probe",), "linear probe (train.evaluate) finds"),
        (("knn",), "k-NN (train.evaluate) finds"),
        (("knn", "probe"), "k-NN and linear probe (train.evaluate) find"),
    ],
)
def test_a_shard_that_a_probe_learns_and_classifies_is_said_of_those_that_run(
    shards, tmp_path, classifiers, words
):
    settings = [f"train.evaluate.{name}=true" for name in classifiers]
    (warning,) = said(shards, tmp_path, "data.probe_val_shards=SHARDS/train", *settings)
    begin = f"1 shard of data.probe_val_shards is in data.shards too: {words} the images themselves"
    assert warning.startswith(begin)


def test_held_out_shards_that_are_trained_on_are_said_by_number(shards, tmp_path):
    (warning,) = said(shards, tmp_path, "data.val_shards=SHARDS/train")
    assert warning.startswith("1 shard of data.val_shards is in data.shards too: val/ is not")
    both = f"[{shards / 'train'},{shards / 'few'}]"
    given = (f"data.shards={both}", f"data.val_shards={both}")
    (warning,) = said(shards, tmp_path, *given)
    assert warning.startswith("2 shards of data.val_shards are in data.shards too: val/ is not")


def test_too_few_held_out_images_to_show_a_collapse_are_said(shards, tmp_path):
    few = "data.val_shards=SHARDS/few"
    (warning,) = said(shards, tmp_path, few, *LEJEPA)
    assert "need 32 held-out images, and data.val_shards has 7: there are no such" in warning
    assert said(shards, tmp_path, few) == []
    more = ("train.evaluate.probe=true", "data.probe_val_shards=SHARDS/val")
    assert said(shards, tmp_path, few, *more, *LEJEPA) == []


def test_too_few_images_in_a_step_to_keep_apart_are_said_with_what_to_raise(shards, tmp_path):
    settings = ("data.max_images_per_pack=2", "train.packs_per_step=1", *LEJEPA)
    (warning,) = said(shards, tmp_path, *settings)
    assert warning.startswith("the first step has 1 image, and objective.kind lejepa keeps those")
    for remedy in ("data.token_budget", "data.max_images_per_pack = 2", "train.packs_per_step = 1"):
        assert remedy in warning
    assert said(shards, tmp_path, *settings[:2]) == []


def test_shards_of_too_few_images_to_keep_apart_are_said(shards, tmp_path):
    (warning,) = said(shards, tmp_path, "train.packs_per_step=1", *LEJEPA, data="one")
    assert warning.startswith("data.shards holds 1 image, and objective.kind lejepa keeps those")
    assert warning.endswith("give more images")
