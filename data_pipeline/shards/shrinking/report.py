"""What became of the images of each shard that was written with smaller copies.

``shrink_report.jsonl`` beside the shards has one line for each of them. A shard's line is written
before the shard appears, as a part file, so that one whose writer was killed still has its line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_pipeline.shards.atomic_file import remove_leftovers, write_atomically
from zeta.files import as_record, read_json, read_json_lines

REPORT_NAME = "shrink_report.jsonl"
_PARTS = ".shrink-parts"
_MAX_JSON = 2**30
_REPAIR = "delete the shards beside it and write them again"


@dataclass
class ShardReport:
    """The line of one shard."""

    name: str
    """File name of the shard."""
    images: int = 0
    """Number of images, those that cannot be read included."""
    copies: int = 0
    """Number of images that became smaller copies; the others are as they were."""
    bytes_before: int = 0
    """Bytes of all images before."""
    bytes_after: int = 0
    """Bytes of all images that are in the shard now."""
    dropped: bool = False
    """True if samples that cannot be read were left out."""
    unreadable: list[dict[str, str]] = field(default_factory=list)
    """Key and reason of each sample whose image cannot be read."""

    def refuse(self, key: str, reason: str) -> None:
        """Add a sample whose image cannot be read."""
        self.unreadable.append({"key": key, "reason": reason})


def write_part(folder: Path, report: ShardReport) -> None:
    """Write the line of a shard that is about to appear in `folder`."""
    (folder / _PARTS).mkdir(exist_ok=True)
    with write_atomically(_part(folder, report.name)) as stream:
        stream.write(json.dumps(asdict(report)).encode())


def read_reports(folder: Path) -> dict[str, ShardReport]:
    """Return the lines of a folder by name of shard, those of an interrupted writer included.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        lines = list(read_json_lines(folder / REPORT_NAME, limit=_MAX_JSON, what=_REPAIR))
    except FileNotFoundError:
        lines = []
    for path in sorted((folder / _PARTS).glob("*.json")):
        lines.append((str(path), read_json(path, limit=_MAX_JSON, what=_REPAIR)))
    reports = [as_record(ShardReport, line, place=place, what=_REPAIR) for place, line in lines]
    return {report.name: report for report in reports}


def join_parts(folder: Path, names: Iterable[str]) -> list[ShardReport]:
    """Write the lines of the named shards as one file, and return them in this order.

    A shard without a line, because it holds no smaller copies, has none.
    """
    known = read_reports(folder)
    reports = [known[name] for name in names if name in known]
    with write_atomically(folder / REPORT_NAME) as stream:
        for report in reports:
            stream.write(json.dumps(asdict(report)).encode() + b"\n")
    if (folder / _PARTS).is_dir():
        remove_leftovers(folder / _PARTS)
        for report in reports:
            _part(folder, report.name).unlink(missing_ok=True)
        if not any((folder / _PARTS).iterdir()):
            (folder / _PARTS).rmdir()
    return reports


def _part(folder: Path, name: str) -> Path:
    return folder / _PARTS / f"{name}.json"
