"""Which code a run was made by: package version, and git commit of the source tree."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_TIMEOUT_S = 20


def code_version(package: Path | None = None) -> dict[str, Any]:
    """Return {`package`, `commit`, `dirty`}; what cannot be known is None.

    `commit` is of the work tree that the running source is tracked in, so None for an installed
    copy, wherever it lies; `dirty` tells whether tracked files differ from that commit.

    Args:
        package: folder of a package of the source tree; that of `zeta` unless given.
    """
    package = package or Path(__file__).parent
    commit = dirty = None
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None:
        commit = _git(package, "rev-parse", "HEAD")
        changes = _git(package, "status", "--porcelain", "--untracked-files=no", ":/")
        dirty = None if changes is None else bool(changes)
    try:
        installed = metadata.version("zeta")
    except metadata.PackageNotFoundError:
        installed = None
    return {"package": installed, "commit": commit, "dirty": dirty}


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints, or None where there is no git, no repository or no answer."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
