"""Writing one file of a checkpoint: hashed and on the disk when the call returns."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_BETWEEN_SYNCS = 2**26
"""Bytes after which the disk is waited for."""


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of one file, by its path inside the checkpoint directory."""

    path: str
    size: int
    sha256: str


def write_hashed(root: Path, path: Path, parts: Sequence[memoryview]) -> FileRecord:
    """Create `path` under `root` of `parts`, fsync it, return its size and hash.

    A second thread hashes meanwhile: both take about as long.

    Raises:
        OSError: the bytes did not reach the disk.
    """
    with ThreadPoolExecutor(1) as hasher, path.open("wb") as file:
        digest = hasher.submit(_sha256, parts)
        written = synced = 0
        for part in parts:
            written += file.write(part)
            if written - synced >= _BETWEEN_SYNCS:
                file.flush()
                _to_disk(file.fileno(), written)
                synced = written
        file.flush()
        _to_disk(file.fileno(), written)
        return FileRecord(path.relative_to(root).as_posix(), written, digest.result())


def write_text(root: Path, path: Path, text: str) -> FileRecord:
    """Create a text file as `write_hashed` does."""
    return write_hashed(root, path, [memoryview(text.encode())])


def _to_disk(descriptor: int, size: int) -> None:
    """Wait until what is written is on the disk, then free its memory.

    Nobody reads it soon: the shards that training reads lose no room to it in the page cache, and
    the next part is copied to the same pages again, which are in the processor's caches.
    """
    os.fsync(descriptor)
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)


def _sha256(parts: Sequence[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
