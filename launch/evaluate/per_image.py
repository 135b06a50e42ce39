"""Write what a model said of every image of an evaluation: a table, and the confusion matrix."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zeta.files import write_whole
from zeta.probes.rows import Columns

_MOST_NAMED = 40
"""Largest number of classes whose names and counts can be read in a picture."""


def write_per_image(
    path: Path, rows: Columns, class_names: Sequence[str], files: Sequence[str] | None
) -> None:
    """Write a row for every image: its name, its class, the predicted class and the scores.

    Args:
        path: CSV file.
        rows: rows of `zeta.probes.image_scores.ImageScores` with `key` and `predicted`.
        class_names: names of the classes.
        files: file of each image, by its sample id; None: images are named by their keys.

    Raises:
        OSError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["image", "class", "predicted", "probability", "top1", "top5", "loss"])
    names = rows["key"] if files is None else [files[number] for number in rows["sample_id"]]
    for row, name in enumerate(names):
        label = int(rows["label"][row])
        writer.writerow(
            [
                name,
                class_names[label] if label >= 0 else "",
                class_names[int(rows["predicted"][row])],
                f"{rows['probability'][row]:.6g}",
                int(rows["top1"][row]),
                int(rows["top5"][row]),
                f"{rows['loss'][row]:.6g}",
            ]
        )
    with write_whole(path) as stream:
        stream.write(text.getvalue().encode("utf-8", "surrogateescape"))


def confusion_matrix(rows: Columns, num_classes: int) -> NDArray[np.int64]:
    """Return [K, K] counts of images by class (rows) and predicted class (columns)."""
    pairs = rows["label"].astype(np.int64) * num_classes + rows["predicted"]
    counts = np.bincount(pairs, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def write_confusion(path: Path, counts: NDArray[np.int64], class_names: Sequence[str]) -> None:
    """Write a confusion matrix as a table (.csv) or as a picture (.png, .svg or .pdf).

    Raises:
        OSError: the file cannot be written.
    """
    if path.suffix.lower() == ".csv":
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["class \\ predicted", *class_names])
        writer.writerows([name, *row] for name, row in zip(class_names, counts, strict=True))
        content = text.getvalue().encode()
    else:
        content = _picture(counts, class_names, path.suffix[1:].lower())
    with write_whole(path) as stream:
        stream.write(content)


def _picture(counts: NDArray[np.int64], class_names: Sequence[str], form: str) -> bytes:
    """Draw the share of each class's images that is taken for each class; counts where few."""
    import warnings

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    named = len(class_names) <= _MOST_NAMED
    side = 3.0 + 0.35 * len(class_names) if named else 10.0
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("class")
    if named:
        places = list(range(len(class_names)))
        axes.set_xticks(places, class_names, rotation=90, parse_math=False)
        axes.set_yticks(places, class_names, parse_math=False)
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = f"{counts[row, column]}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize="small")
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes; the table has the names.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format=form, dpi=120)
    return buffer.getvalue()
