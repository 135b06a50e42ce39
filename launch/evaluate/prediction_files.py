"""Write predictions for people (text), for spreadsheets (CSV), or for programs (JSON lines)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.evaluate.predict import Prediction


def _text(predictions: Sequence[Prediction]) -> str:
    width = max((len(each.image) for each in predictions), default=0)
    return "".join(f"{each.image:<{width}}  {_said(each)}\n" for each in predictions)


def _said(prediction: Prediction) -> str:
    if prediction.error is not None:
        return f"not used: {prediction.error}"
    return ", ".join(f"{name} {share:.1%}" for name, share in prediction.classes)


def _csv(predictions: Sequence[Prediction]) -> str:
    most = max((len(each.classes) for each in predictions), default=0)
    head = [part for n in range(1, most + 1) for part in (f"class_{n}", f"probability_{n}")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *head, "error"])
    for each in predictions:
        cells = [cell for name, share in each.classes for cell in (name, f"{share:.6g}")]
        cells += [""] * (2 * most - len(cells))
        writer.writerow([each.image, *cells, each.error or ""])
    return text.getvalue()


def _json_lines(predictions: Sequence[Prediction]) -> str:
    return "".join(f"{json.dumps(_as_object(each))}\n" for each in predictions)


def _as_object(prediction: Prediction) -> dict[str, object]:
    if prediction.error is not None:
        return {"image": prediction.image, "error": prediction.error}
    classes = [{"name": name, "probability": share} for name, share in prediction.classes]
    return {"image": prediction.image, "classes": classes}


FORMATS: dict[str, Callable[[Sequence[Prediction]], str]] = {
    "text": _text,
    "csv": _csv,
    "jsonl": _json_lines,
}
"""The writers, by the name of the format."""


def format_of(asked: str | None, out: Path | None) -> str:
    """Return the format that was asked for; if none was, the one that the file's name says.

    Raises:
        ValueError: the name of the file says nothing, or something else than was asked for.
    """
    ending = "" if out is None else out.suffix.lower().removeprefix(".")
    if asked is None and out is not None and ending not in ("csv", "jsonl", "txt"):
        raise ValueError(
            f"--out is {out}: give a name that ends in .csv, .jsonl or .txt, or choose a --format"
        )
    return asked or {"csv": "csv", "jsonl": "jsonl"}.get(ending, "text")
