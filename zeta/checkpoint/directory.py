"""A checkpoint directory: its files, the check of its bytes, the reading of its weights.

`step_XXXXXXXX/` holds DeepSpeed's files in `zero/`, the random state of each rank in `ranks/`, the
moving average of the weights in `average/` where one is kept, `trainer.json`, `config.yaml`, and
`manifest.json` with the size and SHA-256 of every other file. `zeta.checkpoint.store` writes it.
Nothing here needs a process group.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from zeta.checkpoint.hashed_file import FileRecord, write_text
from zeta.exit_codes import RunError
from zeta.files import read_json
from zeta.run.directory import TRAINER_STATE, step_name, step_names, step_of
from zeta.stored_tensors import StoredTensor, in_memory
from zeta.zero.state import AVERAGE, WEIGHTS, ZeroState

FORMAT = 2
"""Number of the layout that is written, `format` in trainer.json. This version reads it and all
before: 1, which has no number and no `optimizer_order`, and calls `progress.since_log` window."""
MANIFEST = "manifest.json"
CONFIG = "config.yaml"
ZERO = "zero"
RANKS = "ranks"
AVERAGES = "average"
_MOST_BYTES = 2**28
"""Most bytes of a JSON file in a checkpoint."""
_ASIDE = "it is set aside at the next start"


def write_manifest(directory: Path, records: list[FileRecord]) -> None:
    """Write the manifest of a directory whose other files are all written and fsynced."""
    files = {record.path: [record.size, record.sha256] for record in records}
    write_text(directory, directory / MANIFEST, json.dumps({"files": files}, indent=1))


def find_fault(directory: Path, rank: int = 0, ranks: int = 1, hashes: bool = True) -> str | None:
    """Return the fault of a checkpoint directory in words, or None if it is whole.

    Args:
        directory: `step_XXXXXXXX/`.
        rank: check only every `ranks`-th file from this one on, so that the ranks of a job share
            the reading.
        ranks: number of ranks that share it.
        hashes: also read every byte; else sizes only.
    """
    try:
        for name, (size, digest) in sorted(_listed(directory).items())[rank::ranks]:
            path = directory / name
            if path.exists() and not path.is_file():  # a device has no end to be hashed
                return f"{name} is not a regular file"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            if hashes:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        return f"the content of {name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} or a file it lists cannot be read: {error}"
    return None


def _listed(directory: Path) -> dict[str, list[Any]]:
    """Return the files of a checkpoint, [size, SHA-256] by name: all it needs, none outside.

    Raises:
        ValueError: the manifest is damaged, names a file outside the directory, or lacks one
            without which nothing can be loaded.
        FileNotFoundError: there is none.
    """
    content = read_json(directory / MANIFEST, limit=_MOST_BYTES, what=_ASIDE)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        raise ValueError("it lists no files")
    for name, record in files.items():
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
            raise ValueError(f"it lists {name[:80]!r}, which is not inside the checkpoint")
        if not (
            isinstance(record, list)
            and len(record) == 2
            and isinstance(record[0], int)
            and isinstance(record[1], str)
        ):
            raise ValueError(f"its record of {name[:80]} is no size and SHA-256")
    for needed in (TRAINER_STATE, CONFIG, f"{ZERO}/"):
        if not any(name.startswith(needed) for name in files):
            raise ValueError(f"it lists no {needed}, which every checkpoint has")
    return files


def require_whole(directory: Path) -> None:
    """Raise ValueError, naming the fault, unless `directory` is a whole checkpoint."""
    fault = find_fault(directory)
    if fault:
        raise ValueError(f"{directory} is not a whole checkpoint: {fault}")


def newest_whole(folder: Path, step: int | None = None) -> Path:
    """Return the newest checkpoint whose files all pass their hashes, or that of `step`.

    Args:
        folder: `checkpoints/` of a run directory; nothing in it is changed.
        step: the checkpoint to take; None: the newest.

    Raises:
        ValueError: no checkpoint is whole; names the faults of those that are there.
    """
    run = folder.parent
    names = step_names(folder)[::-1] if folder.is_dir() else []
    if step is not None:
        wanted = step_name(step)
        if wanted not in names:
            there = ", ".join(str(step_of(name)) for name in names) or "none"
            raise ValueError(f"{run} has no checkpoint of step {step}; there are: {there}")
        names = [wanted]
    faults = []
    for name in names:
        fault = find_fault(folder / name)
        if fault is None:
            return folder / name
        faults.append(f"{name}: {fault}")
    if faults:
        raise ValueError(f"no whole checkpoint in {run}: {'; '.join(faults)}")
    raise ValueError(f"{run} has no checkpoint yet: train until one is saved")


def read_trainer_state(directory: Path) -> dict[str, Any]:
    """Return the trainer's state of a checkpoint, its trainer.json.

    Raises:
        RunError: a newer zeta wrote it, in a format that this one does not know.
        ValueError: it is damaged, or was rewritten with other types; names file and place.
        OSError: it cannot be read.
    """
    path = directory / TRAINER_STATE
    what = f"move {directory} away to go on from the checkpoint before it"
    state: dict[str, Any] = read_json(path, limit=_MOST_BYTES, what=what)
    if fault := _fault_of_state(state):
        raise ValueError(f"{path} is damaged ({fault}); {what}")
    if (written := state.get("format", 1)) > FORMAT:
        raise RunError(
            f"{directory} was written by a newer zeta, in format {written}; this one reads up to "
            f"format {FORMAT}: upgrade zeta"
        )
    return state


def require_entries(directory: Path, state: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError, naming the first, unless a trainer.json has all entries of these names."""
    if missing := [name for name in names if name not in state]:
        raise ValueError(
            f"{directory / TRAINER_STATE} is damaged ({missing[0]} is missing); move {directory} "
            "away to go on from the checkpoint before it"
        )


def _fault_of_state(state: object) -> str:
    """Return the fault of a trainer.json of any format in words; empty: it has the right types."""
    if not isinstance(state, dict):
        return "no object"
    written = state.get("format", 1)
    if not isinstance(written, int) or isinstance(written, bool):
        return "format is no number"
    if written > FORMAT:
        return ""  # refused by its number
    for name, least in (("world_size", 1), ("zero_stage", 0)):
        value = state.get(name, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            return f"{name} is {str(value)[:40]}"
    if not isinstance(state.get("progress", {}), dict):
        return "progress is no object"
    shapes = state.get("parameters", {})
    if not isinstance(shapes, dict) or not all(
        isinstance(shape, list) and all(type(side) is int and side >= 0 for side in shape)
        for shape in shapes.values()
    ):
        return "parameters is no object of shapes"
    return ""


def check_same_model(
    saved: Mapping[str, list[int]], wanted: Mapping[str, list[int]], checkpoint: str
) -> None:
    """Raise RunError, naming the first difference, unless the parameters are the same."""
    for name in sorted({*saved, *wanted}):
        if saved.get(name) != wanted.get(name):
            raise RunError(
                f"{checkpoint} is of another model: {name} is {saved.get(name, 'absent')} there "
                f"and {wanted.get(name, 'absent')} in this config; use another run.dir, or the "
                "model that the run began with"
            )


def open_zero_state(directory: Path, trainer_state: Mapping[str, Any]) -> ZeroState:
    """Open the weights and optimizer state of a checkpoint, of any ZeRO stage and world size.

    Raises:
        ValueError: see `require_entries`; or the files are not those that trainer.json describes.
    """
    require_entries(directory, trainer_state, "zero_stage", "parameters")
    try:
        return ZeroState(
            directory / ZERO,
            trainer_state["zero_stage"],
            trainer_state["parameters"],
            directory / AVERAGES,
            trainer_state.get("frozen", ()),  # before they could be frozen, none were
            trainer_state.get("optimizer_order"),
        )
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        what = (str(error).splitlines() or [""])[0][:400]
        raise ValueError(
            f"{directory} does not hold what its {TRAINER_STATE} describes "
            f"({type(error).__name__}: {what}); move it away to go on from the checkpoint before it"
        ) from error


def stored_weights(directory: Path, *, average: bool = False) -> dict[str, StoredTensor]:
    """Return the weights and buffers of a checkpoint, fp32, to be read one at a time.

    Needs neither the devices nor the ranks that wrote them. The files are not verified.

    Args:
        directory: `step_XXXXXXXX/`.
        average: the moving average of the weights instead of the weights.

    Raises:
        ValueError: `directory` has no moving average.
    """
    state = open_zero_state(directory, read_trainer_state(directory))
    if average and not state.has_average:
        raise ValueError(
            f"{directory} has no moving average of the weights: it was trained without "
            "train.ema_decay"
        )
    key = AVERAGE if average else WEIGHTS
    buffers = {name: buffer.clone() for name, buffer in state.buffers.items()}
    return in_memory(buffers) | {
        name: StoredTensor(tuple(shape), torch.float32, partial(state.full, name, key))
        for name, shape in state.shapes.items()
    }


def load_full_weights(directory: Path, *, average: bool = False) -> dict[str, Tensor]:
    """Return all weights and buffers of a checkpoint in memory, once its files are verified.

    Args:
        directory: `step_XXXXXXXX/`.
        average: the moving average of the weights instead of the weights.

    Raises:
        ValueError: `directory` is not a checkpoint, is damaged, or has no moving average.
    """
    require_whole(directory)
    stored = stored_weights(directory, average=average)
    return {name: tensor.read() for name, tensor in stored.items()}
