"""Part files: the index of one shard each, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.shards.atomic_file import write_atomically
from data_pipeline.shards.checksum import CHECKSUM_DTYPE, rows_digest
from data_pipeline.shards.folder import ShardFolder
from data_pipeline.shards.manifest_files import SAMPLE_DTYPE, VERSION, RejectedLine, ShardEntry
from zeta.files import as_record, parse_json

PARTS_FOLDER = ".manifest-parts"


class ShardPart(NamedTuple):
    """The index of one shard."""

    entry: ShardEntry
    rejected: list[RejectedLine]
    rows: np.ndarray
    """Rows [n] of `SAMPLE_DTYPE`."""
    checksums: np.ndarray
    """Checksums [n] of `CHECKSUM_DTYPE`; zeros where they are not known."""


def part_path(folder: ShardFolder, name: str) -> Path:
    """Return the part file of a shard."""
    return folder.index / PARTS_FOLDER / f"{name}.v{VERSION}.part"


def write_part(folder: ShardFolder, part: ShardPart) -> None:
    """Write a part file: a JSON line, then the rows, then the checksums."""
    head = {
        "entry": asdict(part.entry),
        "rejected": [[line.row, line.key, line.reason] for line in part.rejected],
    }
    with write_atomically(part_path(folder, part.entry.name)) as stream:
        stream.write(json.dumps(head).encode() + b"\n")
        stream.write(part.rows.tobytes() + part.checksums.tobytes())


def read_part(folder: ShardFolder, name: str) -> ShardPart | None:
    """Return the part file of a shard; None if there is none, or none that is whole."""
    path = part_path(folder, name)
    try:
        head, _, body = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    try:
        content = parse_json(head, place=str(path), what="")
        entry = as_record(ShardEntry, content["entry"], place=str(path), what="")
        lines = [RejectedLine(name, *line) for line in content["rejected"]]
        rows = np.frombuffer(body, SAMPLE_DTYPE, entry.count)
        known = np.frombuffer(body, CHECKSUM_DTYPE, offset=rows.nbytes)
    except (ValueError, TypeError, KeyError):
        return None  # the shard is read again
    checksums = known if entry.checksums else np.zeros(entry.count, CHECKSUM_DTYPE)
    whole = (
        entry.name == name
        and len(checksums) == entry.count
        and hashlib.sha256(rows.tobytes()).hexdigest() == entry.digest
        and entry.checksums in ("", rows_digest(rows, checksums))
    )
    return ShardPart(entry, lines, rows, checksums) if whole else None
