"""Find which filesystem a folder lies on, and whether files can be written there."""

from __future__ import annotations

import os
import re
from pathlib import Path

_OF_ONE_NODE = frozenset({"tmpfs", "ramfs", "devtmpfs", "rootfs", "overlay", "aufs"})
"""Filesystems in memory, or the upper layer of a container."""
_DISKS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "vfat", "apfs"})
_MOUNTS = Path("/proc/self/mounts")


def filesystem_kind(path: Path, mounts: str | None = None) -> str:
    """Return the type of the filesystem that holds `path`, or would hold it: nfs4, ext4 ...

    Args:
        path: need not exist.
        mounts: text as of /proc/self/mounts; read from there unless given.

    Returns:
        The type as the kernel names it, or "unknown" where it does not list it.
    """
    if mounts is None:
        if not _MOUNTS.exists():
            return "unknown"
        mounts = _MOUNTS.read_text(errors="surrogateescape")
    resolved = path.expanduser().resolve()
    kind, depth = "unknown", -1
    for line in mounts.splitlines():
        _, folder, this_kind, *_ = line.split(" ")
        mount = Path(_unescape(folder))
        # Of two mounts on one folder the later one is seen.
        if resolved.is_relative_to(mount) and len(mount.parts) >= depth:
            kind, depth = this_kind, len(mount.parts)
    return kind


def only_here(kind: str) -> bool:
    """Return whether no other node can see such a filesystem."""
    return kind in _OF_ONE_NODE


def perhaps_only_here(kind: str) -> bool:
    """Return whether it is a disk of this node, which others see only if this node exports it."""
    return kind in _DISKS


def existing_parent(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    path = path.expanduser().absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_file(path: Path, option: str) -> None:
    """Raise ValueError if no file can be written at `path`, see `check_place`."""
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; give the file to write by {option}, as in {path / 'FILE'}"
        )
    check_place(path, option)


def check_place(path: Path, option: str) -> None:
    """Raise ValueError if nothing can be written where `path` is to lie; nothing is written.

    Args:
        path: need not exist, nor the folder that it is to lie in.
        option: what to give another path by, in messages.
    """
    folder = existing_parent(path.absolute().parent)
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is a file; give another {option}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"{path} cannot be written: nothing may be written in {folder}; give another {option}"
        )


def _unescape(text: str) -> str:
    """Undo the octal escapes of spaces and the like."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
