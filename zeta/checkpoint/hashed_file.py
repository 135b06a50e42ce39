"""Writing one file of a checkpoint: hashed and on the disk when the call returns."""

from __future__ import annotations

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_PART = 2**26
"""Bytes after which the disk is waited for."""


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of one file, by its path inside the checkpoint directory."""

    path: str
    size: int
    sha256: str


def write_hashed(root: Path, path: Path, content: memoryview) -> FileRecord:
    """Create `path` under `root` with `content`, fsync it, and return its size and hash.

    A second thread hashes meanwhile: both take about as long.

    Raises:
        OSError: the bytes did not reach the disk.
    """
    with ThreadPoolExecutor(1) as hasher, path.open("wb") as file:
        digest = hasher.submit(hashlib.sha256, content)
        for start in range(0, max(len(content), 1), _PART):
            file.write(content[start : start + _PART])
            file.flush()
            _to_disk(file.fileno(), file.tell())
        name = path.relative_to(root).as_posix()
        return FileRecord(name, len(content), digest.result().hexdigest())


def write_text(root: Path, path: Path, text: str) -> FileRecord:
    """Create a text file as `write_hashed` does."""
    return write_hashed(root, path, memoryview(text.encode()))


def _to_disk(descriptor: int, size: int) -> None:
    """Wait until the written bytes are on the disk, then free their page cache.

    Nobody reads them soon, and the shards that training reads keep their room in the page cache.
    """
    os.fsync(descriptor)
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
