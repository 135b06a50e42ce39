"""Metrics as a table: metrics.csv, a column a metric (`tracker.kind: csv`)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zeta.files import write_whole_text
from zeta.run.jsonl import step_of_line


class CsvSink:
    """Writer of metrics.csv, whose rows are the lines of metrics.jsonl.

    It is made anew from that file when a run begins or continues, and when a metric appears for the
    first time, so that the two never differ.

    Args:
        path: the table.
        jsonl: metrics.jsonl, which has each line already when it is logged here.
        notify: called with a message, once, when the table cannot be written.
    """

    def __init__(self, path: Path, jsonl: Path, notify: Callable[[str], None] = print) -> None:
        self._path, self._jsonl, self._notify = path, jsonl, notify
        self._columns: list[str] = []
        self._whole, self._notified = False, False
        self._try(self._rewrite)

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Append one row."""
        row = {"step": step, **values}
        known = self._whole and not row.keys() - self._columns
        self._try((lambda: self._append(row)) if known else self._rewrite)

    def flush(self) -> None:
        """Do nothing: each row is passed on at once, and metrics.jsonl is what counts."""

    def close(self) -> None:
        """Do nothing: the file is open only while a row is written."""

    def _rewrite(self) -> None:
        lines = self._jsonl.read_bytes().splitlines(keepends=True) if self._jsonl.exists() else []
        rows = [json.loads(line) for line in lines if step_of_line(line) is not None]
        columns = dict.fromkeys(name for row in rows for name in row)
        self._columns = ["step", *sorted(columns.keys() - {"step"})]
        text = io.StringIO()
        table = csv.DictWriter(text, self._columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_whole_text(self._path, text.getvalue(), durable=False)

    def _append(self, row: Mapping[str, Any]) -> None:
        with self._path.open("a", newline="") as stream:
            csv.DictWriter(stream, self._columns, lineterminator="\n").writerow(row)

    def _try(self, write: Callable[[], None]) -> None:
        """Write, and make the table anew later if that fails: no table is worth a run."""
        try:
            write()
            self._whole, self._notified = True, False
        except OSError as error:
            self._whole = False
            if not self._notified:
                self._notify(
                    f"WARNING: {self._path} cannot be written ({error.strerror}); it is made anew "
                    "from metrics.jsonl once it can"
                )
            self._notified = True
