"""Write files whose unfinished forms can be told from those of a writer that was killed."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from zeta.files import write_whole

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of a file system without flock, such as Lustre and some NFS."""


@contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """Yield a stream as `write_whole` does, locked for as long as the block runs."""
    with write_whole(path) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:  # it is only a hint for `remove_leftovers`
            if error.errno not in NO_LOCKS:
                raise
        yield stream


def remove_leftovers(folder: Path) -> None:
    """Delete what writers in `folder` that were killed outright left unfinished."""
    for path in folder.glob(".*.tmp"):
        try:
            with path.open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except (BlockingIOError, FileNotFoundError):  # in use, or finished just now
            continue
        except OSError as error:  # left for later: nobody can tell whether it is in use, or NFS can
            if error.errno not in (*NO_LOCKS, errno.EBUSY):
                raise
