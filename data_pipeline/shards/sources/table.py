"""A table of image files as a source of shards."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path, PurePath

from data_pipeline.config import warn
from data_pipeline.shards.images.header import ImageError, read_header
from data_pipeline.shards.sample import IMAGE_SUFFIXES
from data_pipeline.shards.sources.sample import (
    FilePart,
    Source,
    SourceSample,
    file_part,
    image_suffix,
    key_of,
)
from data_pipeline.shards.sources.table_rows import TableRow, class_indices, read_rows, shown
from data_pipeline.shards.tar_reader import ShardFile


def from_table(table: Path, labels: bool, root: str | Path | None) -> Source:
    """List the rows of a table; see `data_pipeline.shards.sources.read.open_source`."""
    skipped: Counter[str] = Counter()
    rows = read_rows(table)
    inside = _Inside(table, root)
    kept: list[tuple[Path, TableRow]] = []
    for row in rows:
        path = table.parent / row.path
        if not row.path or not _is_file(path, table, row):
            skipped["row whose file does not exist"] += 1
            continue
        inside.check(path, row)
        if path.suffix.lower()[1:] not in IMAGE_SUFFIXES and not _is_image(path):
            skipped["row whose file is no image, by its name and its content"] += 1
        else:
            kept.append((path, row if labels else row._replace(label="")))
    if not kept:
        raise ValueError(
            f"{table} names no file that exists ({len(rows)} rows); "
            f"paths are relative to {table.parent.resolve()}"
        )
    classes, index = class_indices((row for _, row in kept), table)
    _note_repeats(table, kept)
    samples = []
    for path, row in kept:
        members: dict[str, FilePart | bytes] = {image_suffix(path): file_part(path)}
        if row.label:
            members["cls"] = str(index[row.label]).encode()
        if row.caption:
            members["txt"] = row.caption.encode("utf-8")
        relative = os.path.relpath(path, table.parent)
        samples.append(SourceSample(key_of(PurePath(relative)), members))
    return Source(samples, classes, skipped)


def _is_file(path: Path, table: Path, row: TableRow) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # a folder that may not be entered, a name longer than any file's
        raise ValueError(
            f"{table} line {row.line} names {shown(row.path)}, which cannot be looked up: "
            f"{error.strerror}"
        ) from error


class _Inside:
    """The folder that the files of a table must lie in; a table from elsewhere may name any file.

    Links are followed, so that none leads out of it.
    """

    def __init__(self, table: Path, root: str | Path | None) -> None:
        self._table = table
        self._root = Path(os.path.realpath(Path(root or table.parent).expanduser()))
        self._places: dict[Path, Path] = {}

    def check(self, path: Path, row: TableRow) -> None:
        """Raise ValueError if the file of a row lies outside."""
        if path.parent not in self._places:
            self._places[path.parent] = Path(os.path.realpath(path.parent))
        real = self._places[path.parent] / path.name
        if real.is_symlink():
            real = Path(os.path.realpath(real))
        if not real.is_relative_to(self._root):
            common = os.path.commonpath((self._root, real.parent))
            raise ValueError(
                f"{self._table} line {row.line} names {shown(row.path)}, which lies outside "
                f"{self._root}; if such files are meant to be copied, name a folder that all lie "
                f"in: `zeta shards build {self._table} OUT --root {common}`"
            )


def _is_image(path: Path) -> bool:
    """Return whether a file has the header of an image."""
    try:
        with ShardFile(str(path)) as file:
            read_header(file.read_at, file.nbytes)
    except (ImageError, OSError):
        return False
    return True


def _note_repeats(table: Path, kept: list[tuple[Path, TableRow]]) -> None:
    """Warn of files that several rows name, and of those whose rows disagree about the class."""
    rows: dict[str, list[str]] = {}
    for path, row in kept:
        rows.setdefault(os.path.realpath(path), []).append(row.label)
    repeated = {path: labels for path, labels in rows.items() if len(labels) > 1}
    if not repeated:
        return
    count = sum(map(len, repeated.values()))
    one = "1 file is" if len(repeated) == 1 else f"{len(repeated)} files are"
    warn(f"{one} named in several rows of {table} ({count} rows), and each row is a sample")
    torn = [path for path, labels in repeated.items() if len(set(labels)) > 1]
    if torn:
        one = "1 of them has" if len(torn) == 1 else f"{len(torn)} of them have"
        warn(
            f"{one} different labels in different rows, as {torn[0]} has "
            f"({', '.join(dict.fromkeys(label or 'none' for label in repeated[torn[0]]))}): keep "
            "one row of each, or correct the labels"
        )
