"""The checkpoint store of a run: a checkpoint is whole or absent.

It is built as `.tmp-step_X`; the manifest is written last and fsynced; then one rename publishes
it, and `latest` is replaced. A rank that cannot write its files vetoes the publication. Loading
walks back from the newest to the first whose every byte is as written.

A rank copies its state to memory and continues training while a thread of its own writes the copy.
That thread knows nothing of other ranks: once all have written, they agree and publish together.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from zeta.checkpoint.directory import (
    AVERAGES,
    CONFIG,
    FORMAT,
    RANKS,
    ZERO,
    find_fault,
    open_zero_state,
    read_trainer_state,
    write_manifest,
)
from zeta.checkpoint.hashed_file import FileRecord
from zeta.checkpoint.memory_files import MemoryFiles
from zeta.distributed import World
from zeta.files import sync, write_whole_text
from zeta.random_state import random_state
from zeta.run.directory import TRAINER_STATE, step_name, step_names, step_of
from zeta.zero.protocol import ShardedEngine
from zeta.zero.state import load_into
from zeta.zero.weight_average import WeightAverage

_LATEST = "latest"
_BUILDING = ".tmp-"


class Checkpointed(Protocol):
    """The parts of a training engine whose state is in a checkpoint."""

    sharded: ShardedEngine
    average: WeightAverage | None


@dataclass(frozen=True)
class _Saving:
    """A checkpoint that is being written."""

    step: int
    building: Path
    records: Future[list[FileRecord]]
    """Records of this rank's files, once they are on the disk."""


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
        """Open the store, or create it.

        Args:
            folder: `checkpoints/` of the run directory, visible to all ranks.
            world: the ranks.
            keep_last: newest checkpoints to keep, at least 1.
            keep_every: steps at whose multiples a checkpoint is kept besides; None: no others.
            say: called on rank 0 with messages for the user (a bad checkpoint set aside).
        """
        self.folder = folder
        self.world = world
        self.keep_last, self.keep_every = keep_last, keep_every
        self.say = say
        folder.mkdir(parents=True, exist_ok=True)
        self._files = MemoryFiles()
        self._saving: _Saving | None = None

    def newest_verified(self) -> Path | None:
        """Return the newest checkpoint whose every byte is as written, or None.

        Newer ones that fail are set aside as `step_X.bad-N`; what a killed save left is deleted.
        """
        if self.world.is_main:
            self._remove_leftovers()
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

    def _remove_leftovers(self) -> None:
        """Delete what a killed save left; what cannot be deleted now is left for the next start.

        On NFS a file that a process still has open becomes `.nfs...` when it is deleted, and its
        folder stays until that process has ended.
        """
        for leftover in sorted(self.folder.glob(f"{_BUILDING}*")):
            error = _attempt(partial(_delete, leftover))
            if error is not None:
                self.say(
                    f"WARNING: {leftover} of an earlier start cannot be deleted now ({error}); the "
                    "next start tries again"
                )

    def load(self, directory: Path, engine: Checkpointed) -> None:
        """Load weights and optimizer state into `engine`, whatever ranks and stage wrote them.

        Raises:
            RunError: a newer zeta wrote it, in a format that this one does not know.
        """
        trainer_state = read_trainer_state(directory)
        state = open_zero_state(directory, trainer_state)
        load_into(engine.sharded, state)
        if engine.average is not None:
            engine.average.load(state, trainer_state.get("average_updates", 0))
            if not state.has_average:
                self.say(
                    f"{directory.name} has no moving average of the weights; one begins at its "
                    "weights (train.ema_decay)"
                )

    @property
    def saving(self) -> int | None:
        """Committed steps of the checkpoint that is being written; None: no checkpoint is."""
        return None if self._saving is None else self._saving.step

    @property
    def is_writing(self) -> bool:
        """Whether this rank would wait for its disk in `finish`."""
        return self._saving is not None and not self._saving.records.done()

    def begin(
        self,
        engine: Checkpointed,
        step: int,
        state: Mapping[str, Any],
        config_yaml: str,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """Copy the state to memory, and begin to write it: `engine` may train on meanwhile.

        `finish` returns whatever fails; it must have been called for the checkpoint before.

        Args:
            engine: the engine to save.
            step: committed steps; names the directory.
            state: JSON-able state of the trainer, the same on every rank.
            config_yaml: the resolved config.
            before: brings to the disk the files that must be there before the checkpoint is.
        """
        assert self._saving is None, f"the checkpoint of step {self._saving.step} is not finished"
        building = self.folder / f"{_BUILDING}{step_name(step)}"
        unwritten = _attempt(before)
        error = self._copy(engine, state, config_yaml) or unwritten
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
        # NOTE: no rank continues before rank 0 has published (or failed to): a rank that knows
        # that the checkpoint is saved may exit, and its job may end with it.
        error = self.world.broadcast(error)
        if self.world.is_main:
            self._tidy(building, name, saved=error is None)
        return error

    def _copy(self, engine: Checkpointed, state: Mapping[str, Any], config_yaml: str) -> str | None:
        """Copy the files of this rank to memory; return why that failed, or None."""
        errors: list[str | None] = []

        def keep(name: str, content: object) -> None:
            errors.append(_attempt(lambda: self._files.keep(f"{ZERO}/{name}", content)))

        def copy_small_files() -> None:
            own = f"rank_{self.world.rank:05d}.pt"
            self._files.keep(f"{RANKS}/{own}", random_state())
            if engine.average is not None and (pieces := engine.average.pieces()):
                self._files.keep(f"{AVERAGES}/{own}", pieces)
            if self.world.is_main:
                order = list(engine.sharded.optimizer_order)
                numbered = {"format": FORMAT, **state, "optimizer_order": order}
                self._files.keep_text(TRAINER_STATE, json.dumps(numbered, indent=1))
                self._files.keep_text(CONFIG, config_yaml)

        # NOTE: a collective, so it must not raise on one rank: its errors count afterwards.
        engine.sharded.save(keep)
        errors.append(_attempt(copy_small_files))
        return next(filter(None, errors), None)

    def _write(self, building: Path, error: str | None) -> list[FileRecord]:
        """Write the copy, in the writing thread."""
        if error is not None:
            raise OSError(error)
        return self._files.write(building)

    def _publish(self, building: Path, name: str, records: list[FileRecord]) -> None:
        write_manifest(building, records)
        for folder in {(building / record.path).parent for record in records}:
            sync(folder)
        building.rename(self.folder / name)
        sync(self.folder)

    def _tidy(self, building: Path, name: str, *, saved: bool) -> None:
        """After a save, point `latest` to it and delete old ones; else delete what there is."""
        if not saved:
            shutil.rmtree(building, ignore_errors=True)
            return
        error = _attempt(lambda: self._point_latest(name)) or _attempt(self._prune)
        if error:
            self.say(f"{name} is saved, but tidying {self.folder} failed: {error}")

    def _point_latest(self, name: str) -> None:
        write_whole_text(self.folder / _LATEST, f"{name}\n")

    def _prune(self) -> None:
        """Delete all but those to keep; a damaged one does not count as one of the newest."""
        kept = 0
        for name in reversed(step_names(self.folder)):
            directory = self.folder / name
            kept_for_good = self.keep_every is not None and step_of(name) % self.keep_every == 0
            if kept >= self.keep_last and not kept_for_good:
                # Renamed first, so that a half-deleted directory is not taken for a checkpoint.
                # Nobody waits for the rest, which may take as long as a part of the saving.
                old = directory.rename(_unused(self.folder / f"{_BUILDING}old-{name}"))
                Thread(target=shutil.rmtree, args=(old, True)).start()
            elif find_fault(directory, hashes=False) is None:
                kept += 1


def _attempt(action: Callable[[], object]) -> str | None:
    """Run `action`; return the message of a failure to copy, read or write, or None."""
    try:
        action()
    except (OSError, RuntimeError, MemoryError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__  # torch.save hides a full disk in its own
        named = error if cause is None else cause
        return f"{type(named).__name__}: {named}".splitlines()[0]
    return None


def _first(errors: Sequence[str | None]) -> str | None:
    """Return the first error of the ranks, with its rank, or None if no rank has one."""
    return next((f"rank {rank}: {text}" for rank, text in enumerate(errors) if text), None)


def _set_aside(directory: Path) -> Path:
    return directory.rename(_unused(directory.with_name(f"{directory.name}.bad"), first=1))


def _unused(path: Path, first: int = 0) -> Path:
    """Return the path, or with `-N` behind it the first that does not exist."""
    names = (path if n == 0 else path.with_name(f"{path.name}-{n}") for n in count(first))
    return next(name for name in names if not name.exists())


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
