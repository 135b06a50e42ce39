"""Write files that are whole or absent: under a hidden name beside, then renamed.

`local_path` refuses the names of outputs that would lie somewhere else than they say.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""Errors of a file system that cannot sync folders, such as some on FUSE: its renames last anyway,
or nothing that we can do makes them last."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""Begin of a URL; `pathlib` leaves one slash of two."""
_VARIABLE = re.compile(r"\$(\w+|\{\w*\})")


def local_path(text: str | Path, what: str) -> Path:
    """Return the path of an output, `~` expanded.

    Args:
        text: the path as it was given; need not exist.
        what: what gave it, for messages: run.dir, OUT.

    Raises:
        ValueError: a URL, a variable that no shell has expanded, or the home of an unknown user:
            a folder of that name would be written here, where nobody looks for it.
    """
    path = Path(text)
    if _URL.match(str(text)):
        raise ValueError(
            f"{what} is {str(text)!r}, a URL; it must be a folder or file on a disk that is "
            "mounted here (for a run: one that all nodes see); write it there, and copy it later"
        )
    variable = _VARIABLE.search(str(text))
    if variable is not None and not path.exists():
        raise ValueError(
            f"{what} is {str(text)!r}, but {variable[0]} is not expanded here, so that no value of "
            "the environment gets into a config: write the path in full, or give it on the command "
            "line in double quotes, where your shell expands it"
        )
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{what} is {str(text)!r}, but the home folder of {path.parts[0]} is not known: write "
            "the path in full"
        ) from error


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
