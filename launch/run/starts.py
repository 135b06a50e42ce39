"""Record each start of a run: its time, first step and number of ranks."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path


def note_start(path: Path, step: int, world_size: int) -> None:
    """Append a line about a start of the run.

    Args:
        path: starts.jsonl of the run.
        step: committed steps that it continues from; 0 for a new run.
        world_size: number of ranks.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "ranks": world_size, "time": now}) + "\n")
