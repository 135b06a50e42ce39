"""The folder of an export: whole or absent, and replaced only if it holds nothing else."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zeta.export.formats import all_formats
from zeta.files import local_path, read_json, sync
from zeta.models.exported import CARD_FILE, CONFIG_FILE

_UNFINISHED, _OLD = ".tmp-", "-old"
"""Put around the name of an export that is being written, and of the one that it replaces."""
_LOCK = ".writing"


def check_free(out_dir: Path | str) -> None:
    """Raise ValueError if `out_dir` is not empty and holds anything but an export."""
    out_dir = local_path(out_dir, "the folder of the export")
    if out_dir.is_file():
        raise ValueError(f"{out_dir} is a file: name a directory to write the model to")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not _is_only_an_export(out_dir):
        raise ValueError(
            f"{out_dir} holds something that is not an exported model: name another folder"
        )


@contextmanager
def whole_directory(out_dir: Path | str) -> Iterator[Path]:
    """Yield a directory to write into that takes the name `out_dir` once the block is done.

    Unfinished exports to `out_dir` by processes that were killed are removed.

    Raises:
        ValueError: `out_dir` is not empty and holds anything but an export.
    """
    check_free(out_dir)
    remove_leftovers(out_dir)
    out_dir = Path(out_dir).expanduser().resolve()  # a link stays, and what it leads to is replaced
    partial = out_dir.with_name(f"{_UNFINISHED}{out_dir.name}-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        with _locked(partial / _LOCK):
            yield partial
        for path in (*partial.iterdir(), partial):
            sync(path)
        if out_dir.exists():
            old = partial.with_name(f"{partial.name}{_OLD}")
            shutil.rmtree(old, ignore_errors=True)
            out_dir.rename(old)
            partial.rename(out_dir)
            shutil.rmtree(old, ignore_errors=True)  # may be in use, as on NFS: a later export tries
        else:
            partial.rename(out_dir)
        sync(out_dir.parent)
        remove_leftovers(out_dir)  # of former exports, now that a new one is whole
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(out_dir: Path | str) -> None:
    """Delete unfinished exports to `out_dir`, left beside it by processes that were killed.

    If one was killed while it replaced a former export, that one is kept until a new one is whole.
    """
    out_dir = Path(out_dir).expanduser().resolve()
    ending = f"({_OLD})?" if (out_dir / CONFIG_FILE).is_file() else ""
    for path in _leftovers(out_dir, ending):
        shutil.rmtree(path, ignore_errors=True)


def _leftovers(out_dir: Path, ending: str) -> list[Path]:
    """Return the unfinished exports to `out_dir` that nobody is writing.

    Their process no longer runs on this machine and, as it may be on another machine, holds no
    lock in them.
    """
    if not out_dir.parent.is_dir():
        return []
    names = re.compile(rf"{re.escape(_UNFINISHED + out_dir.name)}-([1-9]\d{{0,8}}){ending}")
    found = []
    for path in sorted(out_dir.parent.iterdir()):
        match = names.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        if not _is_other_process(int(match[1])) and not _is_locked(path / _LOCK):
            found.append(path)
    return found


def _is_other_process(pid: int) -> bool:
    """Return whether a process other than this one has this id."""
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep a lock on a new file; it ends with the file or with the process."""
    with path.open("wb") as stream:
        with suppress(OSError):  # a file system without locks: the process id must do
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
        path.unlink()


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or no locks
        return False
    return False


def _is_only_an_export(directory: Path) -> bool:
    """Return whether all files were written by an export.

    The directory is replaced as a whole, so any other file would be lost, and a config.json alone
    may be anybody's.
    """
    names = {path.name for path in directory.iterdir()}
    if CONFIG_FILE not in names:
        return False
    try:
        config = read_json(directory / CONFIG_FILE, limit=2**28, what="")
    except ValueError:
        return False
    if not isinstance(config, dict):
        return False
    written = set().union(*(each.files(names, config) for each in all_formats().values()))
    return bool(written) and names <= {*written, CONFIG_FILE, CARD_FILE}
