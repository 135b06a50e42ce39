"""What training tells the processes that send its metrics to W&B: one small file without a name.

Its first line is the order, its second, once training has ended, how it ended. The processes share
the open file, and any of them may read it at any time: nothing can fill up or be read away.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from typing import Any

NOT_STARTED = 3
"""Exit status of a session that the W&B client could not start, for want of a server mostly."""
_MOST_BYTES = 2**26


@dataclass(frozen=True)
class Order:
    """Which run it is."""

    run_dir: str
    run_id: str
    name: str
    project: str
    mode: str
    """online or offline."""
    pid: int
    """The process that trains: what W&B measures, and whose end is the end of the session."""
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    """Shown in W&B."""
    resumed_step: int = 0
    """Committed steps that training goes on from."""
    finish_s: float = 30.0
    """Longest that the end of the session may take."""


@dataclass(frozen=True)
class Ending:
    """How training ended."""

    outcome: str
    """finished; stopped: it was asked to, and can go on; failed."""
    why: str = ""
    """What a failed run said."""


class Control:
    """The file."""

    def __init__(self, descriptor: int) -> None:
        """Share the open file `descriptor`."""
        self.descriptor = descriptor

    @classmethod
    def begin(cls, order: Order) -> Control:
        """Make the file."""
        with tempfile.TemporaryFile() as file:
            control = cls(os.dup(file.fileno()))
        control._append(asdict(order))
        return control

    @property
    def order(self) -> Order:
        """The order."""
        return Order(**self._lines()[0])

    @property
    def ending(self) -> Ending | None:
        """How training ended; None: it goes on."""
        lines = self._lines()
        return Ending(**lines[1]) if len(lines) > 1 else None

    def end(self, ending: Ending) -> None:
        """Say how training ended; the first to say it is believed."""
        self._append(asdict(ending))

    def close(self) -> None:
        """Leave the file to the others."""
        os.close(self.descriptor)

    def _append(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record) + "\n").encode()
        os.pwrite(self.descriptor, line, os.fstat(self.descriptor).st_size)

    def _lines(self) -> list[dict[str, Any]]:
        content = os.pread(self.descriptor, _MOST_BYTES, 0)
        return [
            json.loads(line) for line in content.splitlines(keepends=True) if line[-1:] == b"\n"
        ]
