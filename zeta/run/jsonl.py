"""Append-only files of JSON lines that a resume can cut at a step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from zeta.files import write_whole

_BUFFERED_BYTES = 8192
"""Number of buffered bytes at which the lines are passed to the operating system."""


class JsonlFile:
    """An append-only file of JSON objects, each with a `step`, that a resume can cut.

    Lines that a full disk does not accept stay in memory, and are written once there is room.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        """Open `path` to continue after `resume_step`; later lines are moved to `.attempt-N`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_after(path, resume_step)
        self._file = path.open("ab", buffering=0)
        self._unwritten = bytearray()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object."""
        self._unwritten += (json.dumps(record) + "\n").encode()
        if len(self._unwritten) >= _BUFFERED_BYTES:
            with suppress(OSError):  # `flush` raises it, before anything depends on the lines
                self._hand_over()

    def flush(self) -> None:
        """Pass the lines to the operating system and wait until they are on the disk.

        Raises:
            OSError: not all lines were written; the others stay in memory.
        """
        self._hand_over()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close the file."""
        try:
            self.flush()
        finally:
            self._file.close()

    def _hand_over(self) -> None:
        while self._unwritten:
            del self._unwritten[: self._file.write(self._unwritten)]


def cut_after(path: Path, last_step: int) -> None:
    """Keep only the lines of `path` up to `last_step`; move the rest to `path.attempt-N`.

    A line torn by a crash is moved as well. The file is replaced, never truncated in place, so that
    a crash during the cut loses nothing.
    """
    if not path.exists():
        return
    kept: list[bytes] = []
    cut: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        step = step_of_line(line)
        (kept if step is not None and step <= last_step and not cut else cut).append(line)
    if not cut:
        return
    attempt = 1
    while (aside := path.with_name(f"{path.name}.attempt-{attempt}")).exists():
        attempt += 1
    for file, lines in ((aside, cut), (path, kept)):
        with write_whole(file) as stream:
            stream.writelines(lines)


def step_of_line(line: bytes) -> int | None:
    """Return the `step` of a line; None if the line is torn or has no integer `step`."""
    if not line.endswith(b"\n"):
        return None
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None
