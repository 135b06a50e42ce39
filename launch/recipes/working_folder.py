"""A folder that one command makes and goes on with: only under the arguments that it began with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def claim_folder(
    notes: Path,
    what: str,
    wanted: Mapping[str, Any],
    say: Callable[[Mapping[str, Any]], str],
    counts: Mapping[str, float],
) -> dict[str, float]:
    """Make the folder of `notes`, or see that it is there for the same arguments.

    Args:
        notes: JSON file in the folder, which holds the arguments and the counts.
        what: whose folder it is, in messages.
        wanted: the arguments.
        say: writes arguments as on the command line.
        counts: numbers that the command keeps in `notes`, as they are at the beginning.

    Returns:
        The counts as they are now.

    Raises:
        ValueError: the folder holds something else, or began with other arguments.
    """
    folder = notes.parent
    if not notes.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"{folder} exists and holds no {what}; choose another folder with --out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_notes(notes, wanted, counts)
    try:
        found: dict[str, Any] = json.loads(notes.read_text())
        there = {key: found[key] for key in wanted}
        kept = {key: float(found[key]) for key in counts}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{notes} cannot be read ({error}); delete {folder} and start again"
        ) from error
    if there != dict(wanted):
        raise ValueError(
            f"{folder} holds a {what} with {say(there)}, not {say(wanted)}; choose another "
            "folder with --out, or delete it"
        )
    return kept


def write_notes(notes: Path, wanted: Mapping[str, Any], counts: Mapping[str, float]) -> None:
    """Write what `claim_folder` reads."""
    notes.write_text(json.dumps({**wanted, **counts}))


def refuse_own_settings(command: str, overrides: Sequence[str], own: Mapping[str, str]) -> None:
    """Raise ValueError if a `key=value` is of a setting that the command makes itself.

    Args:
        command: its name.
        overrides: what the user gave.
        own: for each such key or section, what to do instead.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        for name, instead in own.items():
            if key == name or key.startswith(f"{name}."):
                raise ValueError(f"{command} sets {key} itself: {instead}")
