"""`starts.jsonl`: when a run was started, from which step, and on how many ranks."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path


def note_start(path: Path, step: int, world_size: int) -> None:
    """Append one line about a start.

    Args:
        path: starts.jsonl of the run.
        step: committed steps that it goes on from; 0 for a run that begins.
        world_size: ranks.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "ranks": world_size, "time": now}) + "\n")
