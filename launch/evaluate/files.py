"""Write the scores of an evaluation as a table (CSV) and as a picture."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.filesystems import check_place
from zeta.files import write_whole

_GROUPS = {
    "by_resolution": "resolution",
    "by_tokens": "tokens",
    "by_aspect_ratio": "aspect ratio",
    "by_image_side": "image side",
    "per_class": "class",
}
_ALONE = {"knn": "k-NN", "linear_probe": "linear probe"}
_COLUMNS = ("group", "name", "images", "top1", "top5", "loss")
_MOST_CLASSES = 40
"""Largest number of readable bars; of more classes only the best and the worst are drawn."""


def write_csv(path: Path, result: Mapping[str, Any]) -> None:
    """Write a row for every size, group of images, class and probe.

    Raises:
        OSError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(_COLUMNS)
    for group, name, row in _rows(result):
        writer.writerow([group, name, *(row.get(column, "") for column in _COLUMNS[2:])])
    with write_whole(path) as stream:
        stream.write(text.getvalue().encode())


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for key, group in _GROUPS.items():
        for name, row in result.get(key, {}).items():
            yield group, name, row
    for key, group in _ALONE.items():
        if key in result:
            yield group, "", result[key]


def plot(path: Path, result: Mapping[str, Any]) -> None:
    """Draw accuracy by size, by group of images and by class, as PNG, SVG or PDF by the suffix.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = list(_charts(result))
    heights = [max(2.0, 0.28 * min(len(groups), _MOST_CLASSES) + 1) for _, groups in shown]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, groups) in zip(axes, shown, strict=True):
        if len(groups) > _MOST_CLASSES:
            ordered = sorted(groups.items(), key=lambda item: item[1]["top1"])
            half = _MOST_CLASSES // 2
            title += f" (the {half} worst and the {half} best of {len(groups):,})"
            groups = dict([*ordered[:half], *ordered[-half:]])
        labels = [f"{name} ({row['images']:,})" for name, row in groups.items()]
        places = list(range(len(groups)))
        axis.barh(places, [100 * row["top5"] for row in groups.values()], color="#c6d4e1")
        axis.barh(places, [100 * row["top1"] for row in groups.values()], color="#2f6690")
        axis.set_yticks(places, labels, parse_math=False)  # names of classes may hold $
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.set_title(f"by {title}", loc="left", fontsize=10)
    axes[-1].set_xlabel("top-1 (dark) and top-5 (light), %; images in brackets")
    with warnings.catch_warnings(), write_whole(path) as stream:
        # Characters that the font lacks are drawn as boxes; the table has the names.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(stream, format=path.suffix[1:].lower(), dpi=120)


def _charts(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the title of each chart, and its rows by name."""
    for key, title in _GROUPS.items():
        if result.get(key):
            yield title, result[key]
    if alone := {name: result[key] for key, name in _ALONE.items() if key in result}:
        yield "frozen features", alone


def prepare_files(
    table: Path | None,
    picture: Path | None,
    per_image: Path | None = None,
    confusion: Path | None = None,
) -> None:
    """Check the files of an evaluation and make their folders, before anything is scored.

    Raises:
        ValueError: a picture cannot have this name, a folder has it, or no file can be there.
        OSError: their folder cannot be made.
    """
    if picture is not None and picture.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot is {picture}; give a name that ends in .png, .svg or .pdf")
    if confusion is not None and confusion.suffix.lower() not in (".csv", ".png", ".svg", ".pdf"):
        raise ValueError(
            f"--confusion is {confusion}; give a name that ends in .csv, .png, .svg or .pdf"
        )
    for option, path in (
        ("--csv", table),
        ("--plot", picture),
        ("--per-image", per_image),
        ("--confusion", confusion),
    ):
        if path is None:
            continue
        if path.is_dir():
            raise ValueError(f"{option} is {path}, a folder; give the name of a file in it")
        check_place(path, option)
        path.parent.mkdir(parents=True, exist_ok=True)
