"""`train.evaluate.knn` and `.probe`: what they cannot use is refused by name before the start."""

from __future__ import annotations

import re

import pytest

from data_pipeline.plan.plan import Plan
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.manifest import Manifest
from launch.config.load import load_config
from launch.config.resolve import resolve_with_shards
from launch.run.checks import check_start
from launch.run.probe_images import open_probe
from tests.data_pipeline.shard_fixtures import jpeg
from tests.zeta.foreign_objective import Brightness

LEJEPA = ("objective.kind=lejepa", "objective.label_smoothing=0", "data.views=2")
BOTH = ("train.evaluate.knn=true", "train.evaluate.probe=true")


class Elsewhere(Brightness):
    """An objective that names a part of the model that is not there."""

    encoder = "trunk."


def build(folder, classes, *, names=None, metadata=None):
    """Shards of one image for each class in the list; None: an image without a class."""
    samples = []
    for i, label in enumerate(classes):
        files = {"jpg": jpeg(40, 40 + 8 * (i % 3), i)}
        if label is not None:
            files["cls"] = str(label).encode()
        samples.append((f"s{i}", files | (metadata or {})))
    build_shards(samples, folder, max_count=20, class_names=names)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards by name: 60 images of a, b and c; 30 held-out ones; 30 without a class."""
    folder = tmp_path_factory.mktemp("shards")
    build(folder / "train", [i % 3 for i in range(60)], names=["a", "b", "c"])
    build(folder / "val", [2 - i % 3 for i in range(30)], names=["c", "b", "a"])
    build(folder / "bare", [None] * 30)
    return folder


def probe_of(shards, *settings, recipe="demo", data="train"):
    """The probe of a run on `data`, without labels unless a setting says otherwise."""
    given = (f"data.shards={shards / data}", *LEJEPA, *settings)
    config = load_config(recipe, [text.replace("SHARDS", str(shards)) for text in given])
    manifest = Manifest.open(str(shards / data))
    return open_probe(resolve_with_shards(config, manifest), manifest)


def labels_of(plan: Plan) -> list[int]:
    return sorted(plan.manifest.samples["label"].tolist())


def test_without_the_settings_there_is_no_probe(shards):
    assert probe_of(shards, "data.val_shards=SHARDS/val", "data.probe_shards=SHARDS/bare") is None


def test_the_parts_are_the_shards_of_the_run_unless_others_are_named(shards):
    own = probe_of(shards, *BOTH, "data.val_shards=SHARDS/val")
    assert own.names == ("data.shards", "data.val_shards")
    assert (own.train.num_images, own.test.num_images) == (60, 30)
    assert own.classifiers == ("knn", "linear_probe")
    assert own.encoder == "image."
    parts = ("data.probe_shards=SHARDS/train", "data.probe_val_shards=SHARDS/val")
    other = probe_of(shards, BOTH[1], *parts, "data.val_shards=SHARDS/bare", data="bare")
    assert other.names == ("data.probe_shards", "data.probe_val_shards")
    assert (other.train.num_images, other.test.num_images) == (60, 30)
    assert other.classifiers == ("linear_probe",)


def test_classes_of_the_two_parts_are_matched_by_name(shards):
    assert probe_of(shards, *BOTH, "data.val_shards=SHARDS/val").classes == [2, 1, 0]


def test_the_cap_takes_equally_many_images_of_each_class_to_learn_from(shards):
    capped = probe_of(shards, *BOTH, "data.val_shards=SHARDS/val", "train.evaluate.probe_images=21")
    assert labels_of(capped.train) == [0] * 7 + [1] * 7 + [2] * 7
    assert capped.test.num_images == 21


def test_held_out_shards_that_are_learned_from_are_counted(shards):
    assert probe_of(shards, *BOTH, "data.val_shards=SHARDS/val").shared == 0
    assert probe_of(shards, *BOTH, "data.val_shards=SHARDS/train").shared == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "train.evaluate.knn is true, but no images are held out for it: set data.probe_val"),
        (["data.val_shards=SHARDS/bare"], "but no image of data.val_shards has a class label"),
        (
            ["data.val_shards=SHARDS/val", "data.probe_shards=SHARDS/bare"],
            "but no image of data.probe_shards has a class label: give labelled shards as data",
        ),
        (
            ["data.val_shards=SHARDS/val", "data.probe_val_shards=SHARDS/nowhere"],
            "data.probe_val_shards: no shard matches",
        ),
        (
            ["data.probe_val_shards=[{path: SHARDS/val, weight: 2}]"],
            "data.probe_val_shards has weights, but each of its images is scored once",
        ),
    ],
)
def test_a_part_without_labels_or_shards_is_refused_by_its_key(shards, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        probe_of(shards, *BOTH, *settings)


def test_fewer_images_than_neighbours_are_refused_for_knn_alone(shards, tmp_path):
    few = f"data.probe_shards={build(tmp_path / 'few', [i % 3 for i in range(19)])}"
    held_out = f"data.val_shards={build(tmp_path / 'val', [0, 1, 2])}"
    with pytest.raises(
        ValueError, match=r"knn asks the 20 most similar .*probe_shards has only 19"
    ):
        probe_of(shards, *BOTH, few, held_out)
    assert probe_of(shards, BOTH[1], few, held_out).train.num_images == 19


def test_classes_without_an_image_to_learn_from_are_named(shards, tmp_path):
    names = [*"abcdefghi"]
    part = build(tmp_path / "part", [i % 2 for i in range(40)], names=names)
    rest = build(tmp_path / "rest", list(range(9)), names=names)
    settings = (*BOTH, f"data.probe_shards={part}", f"data.probe_val_shards={rest}")
    message = (
        "7 of the 9 classes of data.probe_val_shards never occur in data.probe_shards ('c', 'd', "
        "'e', 'f', 'g', ...), so that nothing could be learned of them"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        probe_of(shards, *settings)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a", "b", "cat"], "class 'cat' of the shards is none of"),
        (
            ["airplane", "b", "cat"],
            "2 of the 3 classes of the shards ('airplane', 'cat') are none of",
        ),
    ],
)
def test_classes_by_other_names_are_all_named_with_what_to_do(shards, tmp_path, names, said):
    other = build(tmp_path / "other", [0, 1, 2], names=names)
    message = (
        f"data.probe_val_shards: {said} data.probe_shards's 3 classes: a, b, c; add images of them "
        "to data.probe_shards, or leave them out of data.probe_val_shards; if they are the same "
        "classes by other names, put the same classes.json beside both and index them again"
    )
    settings = ("data.probe_shards=SHARDS/train", f"data.probe_val_shards={other}")
    with pytest.raises(ValueError, match=re.escape(message)):
        probe_of(shards, *BOTH, *settings)


def test_class_numbers_without_names_are_compared_too(shards, tmp_path):
    part = build(tmp_path / "part", [i % 2 for i in range(40)])
    rest = build(tmp_path / "rest", [0, 1, 7])
    settings = (*BOTH, f"data.probe_shards={part}", f"data.probe_val_shards={rest}")
    with pytest.raises(ValueError, match=r"1 of the 3 classes .* never occur in .* \(7\)"):
        probe_of(shards, *settings)


def test_one_class_alone_and_fewer_images_than_classes_are_refused(shards, tmp_path):
    one = build(tmp_path / "one", [4] * 40)
    with pytest.raises(ValueError, match=r"all 40 labelled images of data.probe_shards have one"):
        probe_of(shards, *BOTH, f"data.probe_shards={one}", f"data.val_shards={one}")
    many = build(tmp_path / "many", list(range(30)))
    settings = (*BOTH, f"data.probe_shards={many}", f"data.val_shards={many}")
    with pytest.raises(ValueError, match=r"probe_images is 20, below the 30 classes .*at least 30"):
        probe_of(shards, *settings, "train.evaluate.probe_images=20")
    with pytest.raises(ValueError, match=r"probe_images is 19; it must be at least 20"):
        probe_of(shards, *settings, "train.evaluate.probe_images=19")


def test_lists_of_classes_are_refused(shards, tmp_path):
    lists = build(tmp_path / "lists", [None] * 30, metadata={"json": b'{"label": [0, 1]}'})
    settings = (*BOTH, f"data.probe_shards={lists}", "data.val_shards=SHARDS/val")
    with pytest.raises(ValueError, match=r"knn needs one class an image, and 30 images of data.pr"):
        probe_of(shards, *settings)


def test_a_model_without_embeddings_is_refused_before_the_start(shards, tmp_path):
    settings = (
        f"data.shards={shards / 'train'}",
        f"data.val_shards={shards / 'val'}",
        "objective.kind=tests.launch.run.test_probe_images:Elsewhere",
        f"run.dir={tmp_path / 'run'}",
    )
    with pytest.raises(ValueError, match=r"\(NaViT\) has none at 'trunk\.', which it gives as"):
        check_start(load_config("demo", [*settings, *BOTH]), 1)
    check_start(load_config("demo", settings), 1)
