"""Claim a folder for one process: by a lock, or by a note of its owner where locks are missing."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import socket
from pathlib import Path
from typing import BinaryIO

from data_pipeline.shards.atomic_file import NO_LOCKS

_NOTE = "owner"


def claim_folder(folder: Path) -> tuple[Path, BinaryIO]:
    """Return the first of ``folder``, ``folder-1``, ... that no other process uses, and its claim.

    The folder is made. The claim ends with `release` or with the process.
    """
    for number in itertools.count():
        candidate = folder if number == 0 else folder.with_name(f"{folder.name}-{number}")
        candidate.mkdir(parents=True, exist_ok=True)
        lock = (candidate / "lock").open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return candidate, lock
        except BlockingIOError:
            lock.close()
        except OSError as error:
            if error.errno in NO_LOCKS and _note_owner(candidate / _NOTE):
                return candidate, lock
            lock.close()
            if error.errno not in NO_LOCKS:
                raise
    raise AssertionError("itertools.count() has no end")


def release(claim: BinaryIO) -> None:
    """End a claim, so that the next process may take the folder."""
    note = Path(claim.name).with_name(_NOTE)
    with contextlib.suppress(OSError):
        if note.read_text() == _this_process():
            note.unlink()
    claim.close()


def _note_owner(note: Path) -> bool:
    """Write this process into a file that does not exist; False if another process is in it.

    The note of a process of this machine that has ended is replaced.
    """
    for _ in range(2):
        try:
            with note.open("x") as stream:
                stream.write(_this_process())
            return True
        except FileExistsError:
            if _is_used(note):
                return False
            note.unlink(missing_ok=True)
    return False


def _is_used(note: Path) -> bool:
    host, _, process = note.read_text().partition(" ")
    if host != socket.gethostname() or not process.isdecimal():
        return bool(host)  # a process of another machine: nobody can tell here whether it runs
    try:
        os.kill(int(process), 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _this_process() -> str:
    return f"{socket.gethostname()} {os.getpid()}"
