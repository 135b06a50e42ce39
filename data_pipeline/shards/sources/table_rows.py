"""Tables of images: CSV or JSON lines with the columns path, label and caption."""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

TABLE_SUFFIXES = (".csv", ".jsonl")

_COLUMNS = ("path", "label", "caption")
_LONGEST_FIELD = 2**24
_MAX_LABEL = 2**31 - 1
_INTEGER = re.compile(r"[0-9]+")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?inf(inity)?", re.I)
_MISSING = frozenset(
    ("nan", "-nan", "none", "null", "nil", "na", "n/a", "#n/a", "#na", "<na>", "nat", "?", "-")
)
"""Words, in lower case, that programs write in the place of an absent value."""


class TableRow(NamedTuple):
    """The row of one image; an absent value is ""."""

    path: str
    label: str
    caption: str
    line: int
    """Line of the table in which it ends."""


def read_rows(table: Path) -> list[TableRow]:
    """Return the rows of a ``.csv`` (with a header) or ``.jsonl`` table, UTF-8.

    Raises:
        ValueError: the table cannot be read, has no column path, or neither label nor caption, or
            a row with more or fewer values than the header.
    """
    rows = list(_read_csv(table) if table.suffix.lower() == ".csv" else _read_jsonl(table))
    for number, row in enumerate(rows, 1):
        for name, value in zip(_COLUMNS, row[:3], strict=True):
            if not _is_unicode(value):
                raise ValueError(
                    f"{table}: the {name} of row {number} is not Unicode text: it holds half of "
                    "a surrogate pair; write it again"
                )
    return rows


def class_indices(
    rows: Iterable[TableRow], table: Path
) -> tuple[tuple[str, ...] | None, Mapping[str, int]]:
    """Return the class names (None if all labels are integers) and the index of each label.

    Raises:
        ValueError: a label is a word for a missing value, a number that is no class index, or of
            another kind than the others: one such row would make names of all indices, in the
            order of text. Names the line.
    """
    lines: dict[str, int] = {}
    for row in rows:
        if row.label:
            lines.setdefault(row.label, row.line)
    for label, line in lines.items():
        if label.lower() in _MISSING:
            raise ValueError(
                f"{table} line {line} has the label {shown(label)}, which stands for a missing "
                "value; leave the label of an image without a class empty (if a class has this "
                "name, give it another)"
            )
    numbers = [label for label in lines if _NUMBER.fullmatch(label)]
    wrong = next((label for label in numbers if not _is_index(label)), None)
    if wrong is not None and len(numbers) == len(lines):
        raise ValueError(
            f"{table} line {lines[wrong]} has the label {shown(wrong)}; labels must be class "
            f"indices from 0 to {_MAX_LABEL}, or names (an image without a class has an empty "
            "label)"
        )
    if numbers and len(numbers) < len(lines):
        name = next(label for label in lines if not _NUMBER.fullmatch(label))
        raise ValueError(
            f"{table} line {lines[numbers[0]]} has the label {shown(numbers[0])}, a number, and "
            f"line {lines[name]} the label {shown(name)}, a name; labels must be all class indices "
            "or all names (an image without a class has an empty label)"
        )
    if numbers:
        return None, {label: int(label.lstrip("0") or "0") for label in numbers}
    names = sorted(lines)
    refuse_alike(names, str(table))
    return tuple(names) or None, {name: index for index, name in enumerate(names)}


def shown(text: str) -> str:
    """Return text of a table for a message: in one line, and not much longer than one."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_index(label: str) -> bool:
    digits = label.lstrip("0") or "0"
    return bool(_INTEGER.fullmatch(label)) and len(digits) <= 10 and int(digits) <= _MAX_LABEL


def refuse_alike(names: Iterable[str], where: str) -> None:
    """Raise ValueError if two class names differ in the form of their characters alone.

    "é" is one character or two in Unicode (NFC, NFD): no eye can tell such classes apart.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise ValueError(
                f"{where} has two classes that look alike, {other[:80]!a} and {name[:80]!a}: the "
                "same characters in two forms of Unicode; give both one name"
            )


def _read_csv(table: Path) -> Iterator[TableRow]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            # Strict: a quote that is never closed would swallow the rows after it.
            reader = csv.reader(stream, strict=True)
            header = next(reader, [])
            columns = _find_columns(header, table)
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise ValueError(
                        f"{table} line {reader.line_num} has {len(row)} values under a header of "
                        f"{len(header)}: put quotes around a value that holds a comma, and leave "
                        "absent values empty"
                    )
                path, label, caption = (row[i].strip() if i is not None else "" for i in columns)
                yield TableRow(path, label, caption, reader.line_num)
    except csv.Error as error:
        raise ValueError(f"{table} line {reader.line_num} is not CSV: {error}") from error
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{table} cannot be read as UTF-8 CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


def _find_columns(header: Sequence[str], table: Path) -> list[int | None]:
    """Return the columns of path, label and caption in the header; None for an absent one."""
    found = [name.strip().lower() for name in header]
    twice = next((name for name in _COLUMNS if found.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{table} has two columns {twice}; rename the one that is not meant")
    columns = [found.index(name) if name in found else None for name in _COLUMNS]
    if columns[0] is None or columns[1:] == [None, None]:
        raise ValueError(
            f"{table} has the columns {shown(', '.join(header)) or 'of an empty file'}; it needs "
            "a header with path, and label and/or caption"
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
        row = _json_row(line, table, number)
        described |= "label" in row or "caption" in row
        label, caption = (_value(row.get(k), k, table, number) for k in _COLUMNS[1:])
        yield TableRow(str(row["path"]), label, caption, number)
    if lines and not described:
        raise ValueError(f"no line of {table} has a label or a caption; add one of them")


def _json_row(line: str, table: Path, number: int) -> dict[str, object]:
    """Return the object of a line, with its keys as the header of a CSV has them."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{table} line {number} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{table} line {number} is not an object with a path")
    row = {key.strip().lower(): item for key, item in value.items()}
    if len(row) != len(value) and any(key in _COLUMNS for key in row):
        raise ValueError(f"{table} line {number} has a key twice, in other letters")
    if not isinstance(row.get("path"), str):
        raise ValueError(f"{table} line {number} is not an object with a path")
    return row


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
