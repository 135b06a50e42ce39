"""End the ranks once their launcher is gone, for whatever reason: a separate guardian process.

`python orphans.py` reads from standard input, which only the launcher writes to: one process group
a line, then `done`. End of file without `done` means that the launcher was killed, and the guardian
kills the groups. This also ends stuck ranks and the loader workers, without their cooperation.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable

_DONE = "done"


class Guardian:
    """The guardian process, seen from the launcher."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C is not meant for it
        )

    def add(self, group: int) -> None:
        """Guard a process group from now on."""
        self._write(str(group))

    def dismiss(self) -> None:
        """End the guardian without killing anything, once all groups have ended."""
        self._write(_DONE)
        self._process.communicate()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # guardian killed: the run continues without it
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()


def guard(lines: Iterable[str]) -> None:
    """Read groups until `done`, or until the launcher is gone; then kill them."""
    groups = []
    for line in lines:
        if line.strip() == _DONE:
            return
        groups.append(int(line))
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    guard(sys.stdin)
