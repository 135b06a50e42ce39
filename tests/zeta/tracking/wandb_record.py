"""Reads what the W&B client recorded of a session, from its own `.wandb` file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK = 32768


def records(path: Path, kind: str) -> list[Any]:
    """The records of one kind: history, run, metric, alert, exit, stats, config, summary ..."""
    found = (record for record in _all_records(path) if record.WhichOneof("record_type") == kind)
    return [getattr(record, kind) for record in found]


def history(path: Path) -> list[dict[str, Any]]:
    """The rows that were logged."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        for row in records(path, "history")
    ]


def config(path: Path) -> dict[str, Any]:
    """The config of the run."""
    run = records(path, "run")[0]
    return {item.key: json.loads(item.value_json) for item in run.config.update}


def _all_records(path: Path) -> Iterator[Record]:
    """Read a LevelDB log (7 bytes of header, blocks of 32 KiB) of protobufs."""
    data, position, partial = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        room = _BLOCK - position % _BLOCK
        if room < 7:
            position += room
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        partial += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last part
            record = Record()
            record.ParseFromString(partial)
            yield record
            partial = b""
