"""The scores as a table and a picture."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from launch.evaluation_files import check_plot, plot, write_csv


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


def test_another_kind_of_file_is_refused():
    with pytest.raises(ValueError, match=r"--plot is out.jpg; give a name that ends in .png"):
        check_plot(Path("out.jpg"))
