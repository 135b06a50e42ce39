"""The scores as a table and a picture."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import pytest
from PIL import Image

from launch.evaluate.files import plot, prepare_files, write_csv


def _row(top1: float, images: int = 10) -> dict[str, float]:
    return {"images": images, "rejected": 0, "loss": 1.5, "top1": top1, "top5": 1.0}


RESULT = {
    "top1": 0.5,
    "by_resolution": {"native": _row(0.5), "96": _row(0.25)},
    "by_tokens": {"64": _row(0.75)},
    "per_class": {f'class "{i}", of many': _row(i / 100, 1) for i in range(60)},
    "knn": {"top1": 0.9, "top5": 1.0, "k": 20, "images": 10},
}


def test_the_table_has_a_row_for_everything_and_reads_back(tmp_path: Path):
    write_csv(tmp_path / "scores.csv", RESULT)
    with (tmp_path / "scores.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 + 1 + 60 + 1
    assert rows[1] == {
        **{"group": "resolution", "name": "96", "images": "10"},
        **{"top1": "0.25", "top5": "1.0", "loss": "1.5"},
    }
    assert rows[4]["name"] == 'class "1", of many'
    assert rows[-1]["group"] == "k-NN"
    assert rows[-1]["loss"] == ""


@pytest.mark.slow
def test_the_picture_is_drawn_and_of_many_classes_it_shows_some(tmp_path: Path):
    plot(tmp_path / "all.png", RESULT)
    plot(tmp_path / "some.png", {"by_resolution": RESULT["by_resolution"]})
    whole, part = (Image.open(tmp_path / name) for name in ("all.png", "some.png"))
    assert part.height < whole.height < 3000
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_names_of_classes_are_no_formulas_and_may_be_in_any_script(tmp_path: Path):
    names = (r"$\frac$", "a_$b^{", "日本 鳥")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot(tmp_path / "odd.png", {"per_class": {name: _row(0.5) for name in names}})
    assert Image.open(tmp_path / "odd.png").height > 100


@pytest.mark.slow
def test_features_alone_are_drawn(tmp_path: Path):
    nothing = {"top1": None, "top5": None, "by_resolution": {}}
    plot(tmp_path / "alone.svg", nothing | {"knn": RESULT["knn"]})
    assert "<svg" in (tmp_path / "alone.svg").read_text()


def test_another_kind_of_file_is_refused():
    with pytest.raises(ValueError, match=r"--plot is out.jpg; give a name that ends in .png"):
        prepare_files(None, Path("out.jpg"))


def test_folders_are_made_before_anything_is_scored_and_one_in_the_place_of_a_file_is_refused(
    tmp_path: Path,
):
    table, picture = tmp_path / "new" / "scores.csv", tmp_path / "other" / "scores.png"
    prepare_files(table, picture)
    write_csv(table, RESULT)
    assert picture.parent.is_dir()
    with pytest.raises(ValueError, match=r"--csv is .*new, a folder; give the name of a file"):
        prepare_files(table.parent, None)
