"""Heartbeats: a small file for each rank with its current phase, rewritten by its watchdog."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from zeta.files import as_record, read_json


@dataclass(frozen=True)
class Heartbeat:
    """Content of a heartbeat file."""

    phase: str
    step: int
    phase_s: float
    """Seconds since the rank entered the phase."""
    limit_s: float | None
    """Time limit of the phase, in seconds; null: no limit."""
    time: float
    """Time of writing, in seconds since 1970."""
    rank: int
    host: str
    pid: int


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """Return the readable heartbeats of all ranks, ordered by rank."""
    beats = []
    for path in sorted(folder.glob("rank_*.json")):
        try:
            record = read_json(path, limit=2**20, what="")
            known = {item.name: record[item.name] for item in fields(Heartbeat)}
            beats.append(as_record(Heartbeat, known, place=str(path), what=""))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # just being replaced, or from another version: read it next time
    return beats
