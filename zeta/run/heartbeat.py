"""What each rank is doing, as a small file that its watchdog keeps fresh."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Heartbeat:
    """What a heartbeat file holds."""

    phase: str
    step: int
    phase_s: float
    """How long the rank has been in the phase."""
    limit_s: float | None
    """Limit of the phase; null: none."""
    time: float
    """When this was written, in seconds since 1970."""
    rank: int
    host: str
    pid: int


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """Return the heartbeats of all ranks that left a whole one, by rank."""
    beats = []
    for path in sorted(folder.glob("rank_*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            beats.append(Heartbeat(**{item.name: record[item.name] for item in fields(Heartbeat)}))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # replaced just now, or of another version: the next look sees it
    return beats
