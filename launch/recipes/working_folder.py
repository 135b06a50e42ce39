"""A folder that a command makes and continues in, only with the arguments that it began with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from zeta.files import read_json, write_whole_text


@dataclass(frozen=True)
class WorkingFolder:
    """Files that a command keeps from one call to the next, shards among them."""

    path: Path

    COMMAND: ClassVar[str]
    """Name of the command, in messages and of its notes."""

    @property
    def notes(self) -> Path:
        """Arguments that the command began with in this folder, and its counts."""
        return self.path / f"{self.COMMAND}.json"

    def shards(self, split: str) -> Path:
        """Shards of `train` or `val`."""
        return self.path / "shards" / split


def claim_folder(
    folder: WorkingFolder,
    wanted: Mapping[str, Any],
    as_typed: Callable[[Mapping[str, Any]], str],
    counts: Mapping[str, float],
) -> dict[str, float]:
    """Make a working folder, or check that it was made with the same arguments.

    Args:
        folder: the folder.
        wanted: the arguments.
        as_typed: writes arguments as on the command line.
        counts: numbers that the command keeps in its notes, as they are at the beginning.

    Returns:
        The counts as they are now.

    Raises:
        ValueError: the folder holds something else, or was made with other arguments.
    """
    notes, path, what = folder.notes, folder.path, folder.COMMAND
    if not notes.exists():
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"{path} exists and holds no {what}; choose another folder with --out")
        path.mkdir(parents=True, exist_ok=True)
        write_notes(folder, wanted, counts)
    try:
        found: dict[str, Any] = read_json(notes, limit=2**20, what="")
        there = {key: found[key] for key in wanted}
        kept = {key: float(found[key]) for key in counts}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{notes} cannot be read ({error}); delete {path} and begin again"
        ) from error
    if there != dict(wanted):
        raise ValueError(
            f"{path} holds a {what} with {as_typed(there)}, not {as_typed(wanted)}; choose another "
            "folder with --out, or delete it"
        )
    return kept


def write_notes(
    folder: WorkingFolder, wanted: Mapping[str, Any], counts: Mapping[str, float]
) -> None:
    """Write the notes that `claim_folder` reads."""
    write_whole_text(folder.notes, json.dumps({**wanted, **counts}))


def refuse_own_settings(command: str, overrides: Sequence[str], own: Mapping[str, str]) -> None:
    """Raise ValueError if a `key=value` changes a setting that the command makes itself.

    Args:
        command: name of the command.
        overrides: the settings that the user gave.
        own: advice for each such key or section.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        for name, instead in own.items():
            if key == name or key.startswith(f"{name}."):
                raise ValueError(f"{command} sets {key} itself: {instead}")
