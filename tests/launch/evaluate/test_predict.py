"""`zeta predict`, and folders in the place of shards: the same images get the same numbers."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.shards.build import build_shards
from launch.cli import entry_point
from launch.evaluate.images import as_shards
from launch.evaluate.predict import Question, check_question, predict_images
from launch.evaluate.prediction_files import FORMATS, format_of
from tests.launch.photos import stripes
from tests.launch.tiny_export import write_export
from zeta import NaViT
from zeta.distributed import RankInfo, World

ALONE = World(RankInfo(), torch.device("cpu"))
CLASSES = ("coarse", "fine, \N{LATIN SMALL LETTER E WITH ACUTE}", "middle")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export, photos/ in three classes, and the same images as shards."""
    folder = tmp_path_factory.mktemp("predict")
    write_export(folder / "export", CLASSES)
    rng = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (folder / "photos" / name).mkdir(parents=True)
        for index in range(4):
            picture = stripes(rng, 1.0 + 2 * number, vertical=False)
            picture.save(folder / "photos" / name / f"no. {index}.png")
    (folder / "photos" / CLASSES[0] / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    build_shards(folder / "photos", folder / "shards", seed=None)
    return folder


def _predicted(world: Path, *sources: object, **changes: object):
    question = replace(Question(world / "export", workers=0), **changes)
    with as_shards([str(source) for source in sources], ALONE, labels=False) as images:
        return predict_images(question, images, ALONE)


def test_an_image_gets_the_probabilities_that_the_model_gives_it_alone(world: Path):
    found = {each.image: each for each in _predicted(world, world / "photos")}
    paths = sorted((world / "photos").glob("*/no*.png"))
    assert len(paths) == 12
    model = NaViT.from_pretrained(world / "export")
    for path in paths:
        with torch.no_grad():
            logits = model.head(model.embed([Image.open(path)]))[0]
        shares = dict(zip(CLASSES, logits.softmax(0).tolist(), strict=True))
        said = dict(found[str(path)].classes)
        assert said == pytest.approx(shares, abs=1e-4)
        assert list(said.values()) == sorted(said.values(), reverse=True)


def test_an_image_that_cannot_be_used_is_listed_with_the_reason(world: Path):
    bad = [each for each in _predicted(world, world / "photos") if each.error is not None]
    assert [Path(each.image).name for each in bad] == ["cut.png"]
    assert not bad[0].classes


def test_files_folders_and_shards_of_the_same_images_get_the_same_predictions(world: Path):
    of_folder = _predicted(world, world / "photos", top=2)
    files = sorted((world / "photos").glob("*/*.png"))
    assert _predicted(world, *files, top=2) == sorted(of_folder, key=lambda each: each.image)
    of_shards = _predicted(world, world / "shards", top=2)
    assert [each.classes for each in of_shards] == [each.classes for each in of_folder]
    assert of_shards[-1].image == f"{CLASSES[2]}/no_ 3"
    assert all(len(each.classes) in (0, 2) for each in of_shards)


def test_files_are_named_as_they_were_given(world: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(world / "photos")
    names = [
        f"{CLASSES[1]}/no. 2.png",
        f"{CLASSES[0]}/no. 0.png",
        f"../photos/{CLASSES[2]}/no. 1.png",
    ]
    assert [each.image for each in _predicted(world, *names)] == names


def odd_pictures(folder: Path) -> list[Path]:
    """Write images of odd sizes and kinds of pixels, and one as plain as any."""
    rng = np.random.default_rng(0)

    def noise(height: int, width: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))

    folder.mkdir()
    noise(40, 60).save(folder / "plain.png")
    noise(1, 1).save(folder / "one.png")
    noise(3, 500).save(folder / "wide.png")
    noise(500, 3).save(folder / "tall.jpg")
    noise(40, 60).convert("L").save(folder / "grey.png")
    noise(40, 60).convert("CMYK").save(folder / "cmyk.jpg")
    noise(30, 40).save(folder / "moves.gif", save_all=True, append_images=[noise(30, 40)])
    deep = rng.integers(0, 65535, (40, 50), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    noise(40, 50).quantize(16).save(folder / "palette.png", transparency=3)
    return sorted(folder.iterdir())


def test_images_of_any_size_and_kind_get_what_the_model_gives_each_alone(tmp_path: Path, world):
    paths = odd_pictures(tmp_path / "odd")
    found = {each.image: each for each in _predicted(world, tmp_path / "odd")}
    assert len(found) == len(paths) == 9
    model = NaViT.from_pretrained(world / "export")
    for path in paths:
        picture = Image.open(path)
        if min(picture.size) < 8:  # a side shorter than a patch is enlarged to one
            assert sum(dict(found[str(path)].classes).values()) == pytest.approx(1)
            continue
        with torch.no_grad():
            logits = model.head(model.embed([picture]))[0]
        shares = dict(zip(CLASSES, logits.softmax(0).tolist(), strict=True))
        assert dict(found[str(path)].classes) == pytest.approx(shares, abs=1e-4), path.name
    features = tmp_path / "features"
    words = ["embed", str(world / "export"), str(tmp_path / "odd"), str(features)]
    assert entry_point([*words, "--workers", "0"]) == 0
    assert np.isfinite(np.load(features / "features.npy")).all()


def test_the_size_of_the_images_is_that_of_training_unless_another_is_asked_for(world: Path):
    by_default = _predicted(world, world / "shards")
    assert by_default == _predicted(world, world / "shards", tokens=36)  # 48 x 48, patches of 8
    assert by_default != _predicted(world, world / "shards", resolution="native")


def test_each_format_has_a_line_for_every_image(world: Path):
    found = _predicted(world, world / "photos", top=2)
    rows = list(csv.DictReader(FORMATS["csv"](found).splitlines()))
    lines = [json.loads(line) for line in FORMATS["jsonl"](found).splitlines()]
    text = FORMATS["text"](found).splitlines()
    assert len(rows) == len(lines) == len(text) == 13
    for each, row, line, words in zip(found, rows, lines, text, strict=True):
        assert row["image"] == line["image"] == each.image
        assert words.startswith(each.image)
        if each.error is not None:
            assert row["error"] == line["error"] == each.error
            assert row["class_1"] == ""
            assert "not used" in words
            continue
        (best, share), _ = each.classes
        assert (row["class_1"], line["classes"][0]["name"]) == (best, best)
        assert float(row["probability_1"]) == pytest.approx(share, rel=1e-5)
        assert f"{best} {share:.1%}" in words


def test_the_name_of_the_file_says_its_format_or_the_option_does(tmp_path: Path):
    assert format_of(None, tmp_path / "a.csv") == "csv"
    assert format_of(None, tmp_path / "a.JSONL") == "jsonl"
    assert format_of("csv", tmp_path / "a.dat") == "csv"
    assert format_of(None, None) == "text"
    with pytest.raises(ValueError, match=r"a.dat: give a name that ends in .csv, .jsonl or .txt"):
        format_of(None, tmp_path / "a.dat")


def test_the_command_writes_the_file_and_says_how_many_images_it_could_not_use(
    world: Path, capfd: pytest.CaptureFixture[str]
):
    out = world / "new" / "predictions.csv"
    words = ["predict", str(world / "export"), str(world / "photos"), "--workers", "0"]
    assert entry_point([*words, "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 14
    printed = capfd.readouterr()
    assert printed.out == f"wrote {out}, predictions of 13 images\n"
    assert "1 of 13 images could not be used" in printed.err
    assert entry_point([*words, "--format", "jsonl"]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 13


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing", "nothing does not exist: give a folder of images"),
        ("notes.md", "notes.md is not an image by its name"),
        ("empty", "no images found in .*empty"),
        ("broken", "none of the 1 images of .*broken can be used"),
    ],
)
def test_what_holds_no_images_is_refused_by_name(tmp_path: Path, source: str, message: str):
    (tmp_path / "notes.md").write_text("notes")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"")
    with (
        pytest.raises(ValueError, match=message),
        as_shards([str(tmp_path / source)], ALONE, labels=False),
    ):
        pass


def test_shards_and_images_in_one_command_are_refused(world: Path):
    with (
        pytest.raises(ValueError, match=r"shards is shards and .*photos is images"),
        as_shards([str(world / "photos"), str(world / "shards")], ALONE, labels=False),
    ):
        pass


def test_an_export_without_classes_names_the_command_for_features(tmp_path: Path):
    export = write_export(tmp_path / "export", ["a"])
    config = json.loads((export / "config.json").read_text())
    config["info"]["targets"] = "none"
    (export / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"`zeta embed .* writes features"):
        check_question(Question(export))


def test_class_folders_are_scored_as_shards_of_them_are(world: Path, capsys):
    words = ["--workers", "0", "--json"]
    assert entry_point(["eval", str(world / "export"), str(world / "shards"), *words]) == 0
    of_shards = json.loads(capsys.readouterr().out)
    files = world / "files"
    options = ["--per-image", str(files / "each.csv"), "--confusion", str(files / "matrix.csv")]
    command = ["eval", str(world / "export"), str(world / "photos"), *words, *options]
    assert entry_point(command) == 0
    assert json.loads(capsys.readouterr().out) == of_shards
    rows = list(csv.DictReader((files / "each.csv").open(encoding="utf-8", newline="")))
    assert len(rows) == of_shards["images"] == 12
    assert all(Path(row["image"]).parent.name == row["class"] for row in rows)
    hits = [row["class"] == row["predicted"] for row in rows]
    assert sum(hits) == sum(int(row["top1"]) for row in rows) == round(12 * of_shards["top1"])
    matrix = list(csv.reader((files / "matrix.csv").open(encoding="utf-8", newline="")))
    assert matrix[0][1:] == [row[0] for row in matrix[1:]] == list(CLASSES)
    counts = np.array([row[1:] for row in matrix[1:]], int)
    assert counts.sum() == 12
    assert np.trace(counts) == sum(hits)
    assert counts.sum(axis=1).tolist() == [4, 4, 4]


@pytest.mark.slow
def test_the_confusion_matrix_is_drawn(world: Path, capsys):
    picture = world / "matrix.png"
    command = ["eval", str(world / "export"), str(world / "photos"), "--workers", "0"]
    assert entry_point([*command, "--confusion", str(picture)]) == 0
    assert Image.open(picture).width > 200


def test_features_of_a_folder_are_those_of_its_shards(world: Path, tmp_path: Path, capsys):
    for name in ("photos", "shards"):
        command = ["embed", str(world / "export"), str(world / name), str(tmp_path / name)]
        assert entry_point([*command, "--workers", "0"]) == 0
        assert "features.npy, 12 x 32 (images x channels)" in capsys.readouterr().out
    for file in ("features.npy", "keys.txt", "labels.npy"):
        one, other = (tmp_path / name / file for name in ("photos", "shards"))
        assert one.read_bytes() == other.read_bytes(), file
