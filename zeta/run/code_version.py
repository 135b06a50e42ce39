"""Record the code that made a run: package version, git commit and uncommitted changes."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_TIMEOUT_S = 20
_LARGEST_DIFF = 1_000_000
"""Longest diff to record, in characters."""


def code_version(package: Path | None = None) -> dict[str, Any]:
    """Return {`package`, `commit`, `dirty`}; a value that cannot be determined is None.

    `commit` is the commit of the work tree that tracks the running source; it is None for an
    installed copy, wherever that is. `dirty` is whether tracked files differ from the commit.

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
    """Append the version of the code that continues a run to `path`, unless it ends with it.

    The entry is a line with the version, then the diff against its commit. The diff covers tracked
    files only, because untracked files may contain anything, even secrets.

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
    """Return git's output, or None if git or a repository is missing, or git fails."""
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
