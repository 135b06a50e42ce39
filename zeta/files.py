"""Write files that are whole or absent: under a hidden name beside, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)
"""Errors of a file system that cannot sync folders, such as some on FUSE: its renames last anyway,
or nothing that we can do makes them last."""


@contextmanager
def write_whole(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a stream whose content replaces `path` when the block ends without an error.

    Readers see the old file or the new one, never a part. After an error the old file stays, and
    the unfinished one is removed.

    Args:
        path: the file; its folder must exist.
        durable: wait until content and name are on the disk, so that both survive a power failure.

    Raises:
        OSError: the file cannot be written, or did not reach the disk.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with unfinished.open("wb") as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
            unfinished.replace(path)  # before it is closed, which would release a caller's lock
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_whole_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace `path` with `text` in UTF-8, as `write_whole` does."""
    with write_whole(path, durable=durable) as stream:
        stream.write(text.encode())


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
