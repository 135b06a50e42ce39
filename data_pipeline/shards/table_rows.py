"""Tables of images: CSV or JSON lines with the columns path, label and caption."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

TABLE_SUFFIXES = (".csv", ".jsonl")

_COLUMNS = ("path", "label", "caption")
_LONGEST_FIELD = 2**24
_INTEGER = re.compile(r"[0-9]+")
_NUMBER = re.compile(r"[-+]?[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?")


class TableRow(NamedTuple):
    """The row of one image; an absent value is ""."""

    path: str
    label: str
    caption: str


def read_rows(table: Path) -> list[TableRow]:
    """Return the rows of a ``.csv`` (with a header) or ``.jsonl`` table, UTF-8.

    Raises:
        ValueError: the table cannot be read, or has no column path, or neither label nor caption.
    """
    rows = list(_read_csv(table) if table.suffix.lower() == ".csv" else _read_jsonl(table))
    for number, row in enumerate(rows, 1):
        for name, value in zip(_COLUMNS, row, strict=True):
            if not _is_unicode(value):
                raise ValueError(
                    f"{table}: the {name} of row {number} is not Unicode text: it holds half of "
                    "a surrogate pair; write it again"
                )
    return rows


def class_indices(
    labels: Iterable[str], where: Path
) -> tuple[tuple[str, ...] | None, Mapping[str, int]]:
    """Return the class names (None if all labels are integers) and the index of each label.

    Raises:
        ValueError: labels are numbers but not class indices; `where` names the table.
    """
    names = sorted(set(labels))
    if all(_INTEGER.fullmatch(name) for name in names):
        return None, {name: int(name) for name in names}
    numbers = [name for name in names if _NUMBER.fullmatch(name)]
    if len(numbers) == len(names):
        wrong = next(name for name in numbers if not _INTEGER.fullmatch(name))
        raise ValueError(
            f"{where} has the label {wrong}; labels must be class indices from 0 on, or names "
            "(an image without a class has an empty label)"
        )
    return tuple(names), {name: index for index, name in enumerate(names)}


def _read_csv(table: Path) -> Iterator[TableRow]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            columns = _find_columns(next(reader, []), table)
            for row in reader:
                if row:
                    values = (row[i] if i is not None and i < len(row) else "" for i in columns)
                    yield TableRow(*(value.strip() for value in values))
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise ValueError(f"{table} cannot be read as UTF-8 CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


def _find_columns(header: Sequence[str], table: Path) -> list[int | None]:
    """Return the columns of path, label and caption in the header; None for an absent one."""
    found = [name.strip().lower() for name in header]
    columns = [found.index(name) if name in found else None for name in _COLUMNS]
    if columns[0] is None or columns[1:] == [None, None]:
        raise ValueError(
            f"{table} has the columns {', '.join(header) or 'of an empty file'}; it needs a header "
            "with path, and label and/or caption"
        )
    return columns


def _read_jsonl(table: Path) -> Iterator[TableRow]:
    try:
        text = table.read_text("utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{table} cannot be read as UTF-8 text: {error}") from error
    described = False
    # Not splitlines(): it also splits at other characters that a caption may hold.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{table} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("path"), str):
            raise ValueError(f"{table} line {number} is not an object with a path")
        described |= "label" in row or "caption" in row
        yield TableRow(row["path"], *(_value(row.get(k), k, table, number) for k in _COLUMNS[1:]))
    if lines and not described:
        raise ValueError(f"no line of {table} has a label or a caption; add one of them")


def _value(value: object, name: str, table: Path, number: int) -> str:
    if value is None:
        return ""
    integer = isinstance(value, int) and not isinstance(value, bool) and name == "label"
    if not isinstance(value, str) and not integer:
        raise ValueError(
            f"{table} line {number}: {name} is {json.dumps(value)[:80]}, a {type(value).__name__}; "
            f"it must be {'an integer or a name' if name == 'label' else 'text'}"
        )
    return str(value).strip() if name == "label" else str(value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
