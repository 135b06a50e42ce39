"""Which code a run was made by: package version, git commit of the source tree, and its changes."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_TIMEOUT_S = 20
_LARGEST_DIFF = 1_000_000
"""Characters; nobody reads more."""


def code_version(package: Path | None = None) -> dict[str, Any]:
    """Return {`package`, `commit`, `dirty`}; what cannot be known is None.

    `commit` is of the work tree that the running source is tracked in, so None for an installed
    copy, wherever it lies; `dirty` tells whether tracked files differ from that commit.

    Args:
        package: folder of a package of the source tree; that of `zeta` unless given.
    """
    package = package or Path(__file__).parents[1]
    commit = dirty = None
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None:
        commit = (_git(package, "rev-parse", "HEAD") or "").strip() or None
        changes = _git(package, "status", "--porcelain", "--untracked-files=no", ":/")
        dirty = None if changes is None else bool(changes)
    try:
        installed = metadata.version("zeta")
    except metadata.PackageNotFoundError:
        installed = None
    return {"package": installed, "commit": commit, "dirty": dirty}


def note_code(path: Path, package: Path | None = None) -> None:
    """Write which code goes on with a run to the end of `path`, unless it stands there already.

    A line with the version, then the diff to its commit: of tracked files only, because what is
    untracked may be anything, secrets too.

    Args:
        path: `code.diff` of a run.
        package: as for `code_version`.
    """
    package = package or Path(__file__).parents[1]
    version = code_version(package)
    changes = {True: "with changes", False: "unchanged", None: "changes unknown"}
    package_version, commit = (version[name] or "unknown" for name in ("package", "commit"))
    text = f"zeta {package_version}, commit {commit}, {changes[version['dirty']]}\n"
    if version["dirty"]:
        options = ("--no-ext-diff", "--no-textconv", "--no-color")
        diff = _git(package, "diff", "HEAD", *options, "--", ":/") or "(git gave no diff)\n"
        if len(diff) > _LARGEST_DIFF:
            diff = f"{diff[:_LARGEST_DIFF]}\n(cut short: {len(diff):,} characters in all)\n"
        text += diff
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if not before.endswith(text):
        path.write_text(before + text, encoding="utf-8")


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints, or None where there is no git, no repository or no answer."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # a diff holds files in any encoding
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
