"""The checkpoint store of a run: a checkpoint is whole or absent.

It is built as `.tmp-step_X`; the manifest is written last and fsynced; then one rename publishes
it, and `latest` is replaced. A rank that cannot write its files vetoes the publication. Loading
walks from the newest to the newest whose every byte is as written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from zeta.checkpoint import (
    AVERAGES,
    CONFIG,
    RANKS,
    TRAINER_STATE,
    ZERO,
    FileRecord,
    find_fault,
    open_zero_state,
    read_trainer_state,
    step_name,
    step_names,
    step_of,
    write_hashed,
    write_manifest,
    write_text,
)
from zeta.distributed import World
from zeta.engine import TrainEngine
from zeta.random_state import random_state
from zeta.zero_layout import load_into

_LATEST = "latest"
_BUILDING = ".tmp-"


class CheckpointStore:
    """The checkpoints of one run; every method is called by all ranks together."""

    def __init__(
        self,
        folder: Path,
        world: World,
        keep_last: int,
        keep_every: int | None,
        say: Callable[[str], None],
    ) -> None:
        """Open (or create) the store.

        Args:
            folder: `checkpoints/` of the run directory, visible to all ranks.
            world: the ranks.
            keep_last: newest checkpoints to keep, at least 1.
            keep_every: checkpoints of its multiples are kept besides; None: no others.
            say: called on rank 0 with what the user should know (a bad checkpoint set aside).
        """
        self.folder = folder
        self.world = world
        self.keep_last, self.keep_every = keep_last, keep_every
        self.say = say
        folder.mkdir(parents=True, exist_ok=True)

    def newest_verified(self) -> Path | None:
        """Return the newest checkpoint whose every byte is as written, or None.

        Newer ones that fail are set aside as `step_X.bad-N`; leftovers of a killed save go.
        """
        if self.world.is_main:
            for leftover in self.folder.glob(f"{_BUILDING}*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        while True:
            names = step_names(self.folder) if self.world.is_main else []
            newest: str | None = self.world.broadcast(names[-1] if names else None)
            if newest is None:
                return None
            candidate = self.folder / newest
            shares = self.world.gather(find_fault(candidate, self.world.rank, self.world.size))
            fault = next((fault for fault in shares if fault), None)
            if fault is None:
                return candidate
            if self.world.is_main:
                aside = _set_aside(candidate)
                self.say(
                    f"checkpoint {candidate.name} is damaged ({fault}); kept as {aside.name}, "
                    "going back to the one before it"
                )

    def load(self, directory: Path, engine: TrainEngine) -> None:
        """Load weights and optimizer state into `engine`, whatever ranks and stage wrote them."""
        trainer_state = read_trainer_state(directory)
        state = open_zero_state(directory, trainer_state)
        load_into(engine.deepspeed, engine.stage, state)
        if engine.average is not None:
            engine.average.load(state, trainer_state.get("average_updates", 0))
            if not state.has_average:
                self.say(
                    f"{directory.name} has no moving average of the weights; one begins at its "
                    "weights (train.ema_decay)"
                )

    def save(
        self, engine: TrainEngine, step: int, state: Mapping[str, Any], config_yaml: str
    ) -> str | None:
        """Write and publish the checkpoint of `step`; return why it failed, or None.

        Args:
            engine: what to save.
            step: committed steps; names the directory.
            state: JSON-able state of the trainer, the same on every rank.
            config_yaml: the resolved config.

        A failure leaves the earlier checkpoints as they were, on every rank alike.
        """
        name = step_name(step)
        building = self.folder / f"{_BUILDING}{name}"
        parts = (ZERO, RANKS) if engine.average is None else (ZERO, RANKS, AVERAGES)
        error = _first(self.world.gather(_attempt(lambda: self._prepare(building, parts))))
        if error is None:
            records: list[FileRecord] = []
            local_error = self._write_rank_files(engine, building, state, config_yaml, records)
            gathered: list[tuple[list[FileRecord], str | None]]
            gathered = self.world.gather((records, local_error))
            error = _first([text for _, text in gathered])
            if error is None and self.world.is_main:
                everything = [record for of_rank, _ in gathered for record in of_rank]
                error = _attempt(lambda: self._publish(building, name, everything))
            # NOTE: no rank goes on before rank 0 has published (or failed to): a rank that is
            # told "saved" may exit, and its job may end with it.
            error = self.world.broadcast(error)
        if self.world.is_main:
            self._tidy(building, name, saved=error is None)
        return error

    def _prepare(self, building: Path, parts: Sequence[str]) -> None:
        for part in parts:
            (building / part).mkdir(parents=True, exist_ok=True)

    def _write_rank_files(
        self,
        engine: TrainEngine,
        building: Path,
        state: Mapping[str, Any],
        config_yaml: str,
        records: list[FileRecord],
    ) -> str | None:
        """Write what this rank has to write, noting each file in `records`."""
        recorder = _Recorder(building, records)
        engine.deepspeed.checkpoint_engine.save = recorder.save
        # Its copies of conversion scripts are not wanted, and could fail outside the recorder.
        engine.deepspeed._copy_recovery_script = lambda directory: None
        # NOTE: ends in a barrier, so it must be reached by all ranks and must not raise on one:
        # the recorder keeps the error for after it.
        engine.deepspeed.save_checkpoint(str(building), tag=ZERO, save_latest=False)

        def write_small_files() -> None:
            own = f"rank_{self.world.rank:05d}.pt"
            contents = {RANKS: random_state()}
            if engine.average is not None and (pieces := engine.average.pieces()):
                contents[AVERAGES] = pieces
            for part, content in contents.items():
                save = partial(torch.save, content)
                records.append(write_hashed(building, building / part / own, save))
            if self.world.is_main:
                texts = {TRAINER_STATE: json.dumps(state, indent=1), CONFIG: config_yaml}
                for file_name, text in texts.items():
                    records.append(write_text(building, building / file_name, text))

        return recorder.error or _attempt(write_small_files)

    def _publish(self, building: Path, name: str, records: list[FileRecord]) -> None:
        write_manifest(building, records)
        for folder in {(building / record.path).parent for record in records}:
            _fsync_directory(folder)
        building.rename(self.folder / name)
        _fsync_directory(self.folder)

    def _tidy(self, building: Path, name: str, *, saved: bool) -> None:
        """After a save, point `latest` to it and delete old ones; else delete what there is."""
        if not saved:
            shutil.rmtree(building, ignore_errors=True)
            return
        error = _attempt(lambda: self._point_latest(name)) or _attempt(self._prune)
        if error:
            self.say(f"{name} is saved, but tidying {self.folder} failed: {error}")

    def _point_latest(self, name: str) -> None:
        pointer = self.folder / f"{_BUILDING}{_LATEST}"
        write_text(self.folder, pointer, f"{name}\n")
        pointer.replace(self.folder / _LATEST)
        _fsync_directory(self.folder)

    def _prune(self) -> None:
        """Delete all but those to keep; a damaged one does not count as one of the newest."""
        kept = 0
        for name in reversed(step_names(self.folder)):
            directory = self.folder / name
            kept_for_good = self.keep_every is not None and step_of(name) % self.keep_every == 0
            if kept >= self.keep_last and not kept_for_good:
                # Renamed first, so that a half-deleted one is no checkpoint. Nobody waits for the
                # rest, which may take as long as a part of the saving.
                old = directory.rename(self.folder / f"{_BUILDING}old-{name}")
                Thread(target=shutil.rmtree, args=(old, True)).start()
            elif find_fault(directory, hashes=False) is None:
                kept += 1


class _Recorder:
    """Writes DeepSpeed's files, hashed; keeps an error instead of leaving peers in a barrier."""

    def __init__(self, root: Path, records: list[FileRecord]) -> None:
        self.root = root
        self.records = records
        self.error: str | None = None

    def save(self, state_dict: object, path: str) -> None:
        """Write one file of this rank."""
        if self.error is None:
            self.error = _attempt(
                lambda: self.records.append(
                    write_hashed(self.root, Path(path), lambda f: torch.save(state_dict, f))
                )
            )


def _attempt(action: Callable[[], object]) -> str | None:
    """Run `action`; return the message of a failure to read or write, or None."""
    try:
        action()
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__  # torch.save hides a full disk in its own
        told = error if cause is None else cause
        return f"{type(told).__name__}: {told}".splitlines()[0]
    return None


def _first(errors: Sequence[str | None]) -> str | None:
    """Return the first error of the ranks, told with its rank, or None if there is none."""
    return next((f"rank {rank}: {text}" for rank, text in enumerate(errors) if text), None)


def _set_aside(directory: Path) -> Path:
    attempt = 1
    while (aside := directory.with_name(f"{directory.name}.bad-{attempt}")).exists():
        attempt += 1
    return directory.rename(aside)


def _fsync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
