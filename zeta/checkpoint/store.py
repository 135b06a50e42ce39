"""The checkpoint store of a run: a checkpoint is whole or absent.

It is built as `.tmp-step_X`; the manifest is written last and fsynced; then one rename publishes
it, and `latest` is replaced. A rank that cannot write its files vetoes the publication. Loading
walks from the newest to the newest whose every byte is as written.

A rank copies its state to memory and goes on training while a thread of its own writes the copy.
That thread knows nothing of other ranks: once all have written, they agree and publish together.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from zeta.checkpoint.directory import (
    AVERAGES,
    CONFIG,
    RANKS,
    ZERO,
    find_fault,
    open_zero_state,
    read_trainer_state,
    write_manifest,
)
from zeta.checkpoint.hashed_file import FileRecord, write_text
from zeta.checkpoint.memory_files import HeldFiles
from zeta.distributed import World
from zeta.random_state import random_state
from zeta.run.directory import TRAINER_STATE, step_name, step_names, step_of
from zeta.zero.layout import load_into
from zeta.zero.weight_average import WeightAverage

_LATEST = "latest"
_BUILDING = ".tmp-"


class SavedEngine(Protocol):
    """The engine whose state a checkpoint holds."""

    deepspeed: Any
    stage: int
    average: WeightAverage | None


@dataclass(frozen=True)
class _Saving:
    """A checkpoint that is being written."""

    step: int
    building: Path
    records: Future[list[FileRecord]]
    """Of the files of this rank, once they are on the disk."""


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
        self._files = HeldFiles()
        self._saving: _Saving | None = None

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

    def load(self, directory: Path, engine: SavedEngine) -> None:
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

    @property
    def saving(self) -> int | None:
        """Committed steps of the checkpoint that was begun and is not finished; None: none is."""
        return None if self._saving is None else self._saving.step

    @property
    def is_writing(self) -> bool:
        """Whether this rank would wait for its disk in `finish`."""
        return self._saving is not None and not self._saving.records.done()

    def begin(
        self,
        engine: SavedEngine,
        step: int,
        state: Mapping[str, Any],
        config_yaml: str,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """Copy the state to memory, and begin to write it: `engine` may train on meanwhile.

        Whatever fails is told by `finish`, which must have been called for the one before.

        Args:
            engine: what to save.
            step: committed steps; names the directory.
            state: JSON-able state of the trainer, the same on every rank.
            config_yaml: the resolved config.
            before: brings to the disk what must be there before the checkpoint is.
        """
        assert self._saving is None, f"the checkpoint of step {self._saving.step} is not finished"
        building = self.folder / f"{_BUILDING}{step_name(step)}"
        unwritten = _attempt(before)
        error = self._copy(engine, building, state, config_yaml) or unwritten
        writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving = _Saving(step, building, writer.submit(self._write, building, error))
        writer.shutdown(wait=False)  # its thread ends with its work

    def finish(self) -> str | None:
        """Wait until all ranks have written their files, and publish; return why not, or None.

        A failure leaves the earlier checkpoints as they were, on every rank alike.
        """
        saving, self._saving = self._saving, None
        assert saving is not None, "no checkpoint was begun"
        name, building = step_name(saving.step), saving.building
        records: list[FileRecord] = []
        local_error = _attempt(lambda: records.extend(saving.records.result()))
        self._files.drop()
        gathered: list[tuple[list[FileRecord], str | None]]
        gathered = self.world.gather((records, local_error))
        error: str | None = _first([text for _, text in gathered])
        if error is None and self.world.is_main:
            everything = [record for of_rank, _ in gathered for record in of_rank]
            error = _attempt(lambda: self._publish(building, name, everything))
        # NOTE: no rank goes on before rank 0 has published (or failed to): a rank that is
        # told "saved" may exit, and its job may end with it.
        error = self.world.broadcast(error)
        if self.world.is_main:
            self._tidy(building, name, saved=error is None)
        return error

    def _copy(
        self, engine: SavedEngine, building: Path, state: Mapping[str, Any], config_yaml: str
    ) -> str | None:
        """Copy to memory what this rank has to write; return why that failed, or None."""
        recorder = _Recorder(building, self._files)
        files = engine.deepspeed.checkpoint_engine
        files.save, files.makedirs = recorder.save, recorder.makedirs
        # Its copies of conversion scripts are not wanted.
        engine.deepspeed._copy_recovery_script = lambda directory: None
        # NOTE: ends in a barrier, so it must be reached by all ranks and must not raise on one:
        # the recorder keeps the error for after it.
        engine.deepspeed.save_checkpoint(str(building), tag=ZERO, save_latest=False)

        def copy_small_files() -> None:
            own = f"rank_{self.world.rank:05d}.pt"
            self._files.hold(f"{RANKS}/{own}", random_state())
            if engine.average is not None and (pieces := engine.average.pieces()):
                self._files.hold(f"{AVERAGES}/{own}", pieces)
            if self.world.is_main:
                self._files.hold_text(TRAINER_STATE, json.dumps(state, indent=1))
                self._files.hold_text(CONFIG, config_yaml)

        return recorder.error or _attempt(copy_small_files)

    def _write(self, building: Path, error: str | None) -> list[FileRecord]:
        """Write the copy, in the writing thread."""
        if error is not None:
            raise OSError(error)
        return self._files.write(building)

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
    """Takes DeepSpeed's files; keeps an error instead of leaving peers in a barrier."""

    def __init__(self, root: Path, files: HeldFiles) -> None:
        self._root, self._files = root, files
        self.error: str | None = None

    def save(self, state_dict: object, path: str) -> None:
        """Copy one file of this rank."""
        name = Path(path).relative_to(self._root).as_posix()
        self.error = self.error or _attempt(lambda: self._files.hold(name, state_dict))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing is written yet."""


def _attempt(action: Callable[[], object]) -> str | None:
    """Run `action`; return the message of a failure to copy, read or write, or None."""
    try:
        action()
    except (OSError, RuntimeError, MemoryError) as error:
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
