"""The checkpoint store: a checkpoint is whole or absent.

A step directory holds DeepSpeed's files in `zero/`, the random state of each rank in `ranks/`,
`trainer.json`, `config.yaml`, and `manifest.json` with the size and SHA-256 of every other file.
It is built as `.tmp-step_X`; the manifest is written last and fsynced; then one rename publishes
it, and `latest` is replaced. A rank that cannot write its files vetoes the publication.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from zeta.distributed import World
    from zeta.engine import TrainEngine

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer.json"
CONFIG = "config.yaml"
LATEST = "latest"
_ZERO = "zero"
_UNIVERSAL = "universal"
_BUILDING = ".tmp-"
_STEP_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of one file, by its path inside the step directory."""

    path: str
    size: int
    sha256: str


class CheckpointStore:
    """The checkpoints of one run; every method is called by all ranks together."""

    def __init__(
        self, folder: Path, world: World, keep_last: int, say: Callable[[str], None]
    ) -> None:
        """Open (or create) the store.

        Args:
            folder: `checkpoints/` of the run directory, visible to all ranks.
            keep_last: newest checkpoints to keep.
            say: called on rank 0 with what the user should know (a bad checkpoint set aside).
        """
        self.folder = folder
        self.world = world
        self.keep_last = keep_last
        self.say = say
        folder.mkdir(parents=True, exist_ok=True)

    def newest_verified(self) -> Path | None:
        """Return the newest checkpoint whose every byte is as written, or None.

        Newer ones that fail are set aside as `step_X.bad-N`; leftovers of a killed save go.
        """
        if self.world.is_main:
            for leftover in self.folder.glob(f"{_BUILDING}*"):
                shutil.rmtree(leftover)
        while True:
            names = step_names(self.folder) if self.world.is_main else []
            newest: str | None = self.world.broadcast(names[-1] if names else None)
            if newest is None:
                return None
            candidate = self.folder / newest
            faults = self.world.gather(find_fault(candidate, self.world.rank, self.world.size))
            fault = next((text for text in faults if text), None)
            if fault is None:
                return candidate
            if self.world.is_main:
                aside = _set_aside(candidate)
                self.say(
                    f"checkpoint {candidate.name} is damaged ({fault}); kept as {aside.name}, "
                    "going back to the one before it"
                )

    def save(
        self, engine: TrainEngine, step: int, state: Mapping[str, Any], config_yaml: str
    ) -> str | None:
        """Write and publish the checkpoint of `step`; return why it failed, or None.

        Args:
            state: JSON-able state of the trainer, the same on every rank.
            config_yaml: the resolved config.

        A failure leaves the earlier checkpoints as they were, on every rank alike.
        """
        name = f"step_{step:08d}"
        building = self.folder / f"{_BUILDING}{name}"
        error = self._agree(_attempt(lambda: self._prepare(building)))
        if error is None:
            records: list[FileRecord] = []
            local_error = self._write_rank_files(engine, building, state, config_yaml, records)
            gathered = self.world.gather((records, local_error))
            error = next((text for _, text in gathered if text), None)
            if error is None and self.world.is_main:
                everything = [record for rank_records, _ in gathered for record in rank_records]
                error = _attempt(lambda: self._publish(building, name, everything))
            # NOTE: no rank goes on before rank 0 has published (or failed to): a rank that is
            # told "saved" may exit, and its job may end with it.
            error = self.world.broadcast(error)
        if self.world.is_main:
            if error is None:
                untidy = _attempt(lambda: self._tidy(name))
                if untidy:
                    self.say(f"{name} is saved, but tidying {self.folder} failed: {untidy}")
            else:
                shutil.rmtree(building, ignore_errors=True)
        return error

    def load(self, directory: Path, engine: TrainEngine, universal: Path | None) -> None:
        """Load weights and optimizer into a freshly built engine.

        Args:
            directory: what `newest_verified` returned.
            universal: what `convert` returned, where the shards do not fit the engine's.
        """
        source, tag = (directory, _ZERO) if universal is None else (universal, _UNIVERSAL)
        # DeepSpeed reads with pickle; these bytes were just verified as our own.
        loaded, _ = engine.deepspeed.load_checkpoint(str(source), tag=tag)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {source / tag}")

    def convert(self, directory: Path) -> Path:
        """Convert the shards of `directory` for another number of ranks; return where they are.

        The result lives until `discard_converted` or the next start.
        """
        # Imported here: the converter pulls in most of DeepSpeed, and is rarely needed.
        from deepspeed.checkpoint.ds_to_universal import main as convert_to_universal

        target = self.folder / f"{_BUILDING}universal-{directory.name}"
        error = None
        if self.world.is_main:
            (target / _UNIVERSAL).mkdir(parents=True)
            arguments = Namespace(
                input_folder=str(directory / _ZERO),
                output_folder=str(target / _UNIVERSAL),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
            error = _attempt(lambda: convert_to_universal(arguments))
        # NOTE: the others read the converted files only once rank 0 has written all of them.
        error = self.world.broadcast(error)
        if error:
            raise RuntimeError(
                f"{directory.name} cannot be converted to another world size: {error}"
            )
        return target

    def discard_converted(self, universal: Path) -> None:
        """Delete what `convert` made, once every rank has loaded it."""
        self.world.barrier()
        if self.world.is_main:
            shutil.rmtree(universal, ignore_errors=True)

    def _agree(self, local_error: str | None) -> str | None:
        errors: list[str | None] = self.world.gather(local_error)
        return next((text for text in errors if text), None)

    def _prepare(self, building: Path) -> None:
        # A killed save of the same step left no file of another world size: newest_verified
        # cleaned up at start, and a failed save cleans up after itself.
        for part in (_ZERO, "ranks"):
            (building / part).mkdir(parents=True, exist_ok=True)

    def _write_rank_files(
        self,
        engine: TrainEngine,
        building: Path,
        state: Mapping[str, Any],
        config_yaml: str,
        records: list[FileRecord],
    ) -> str | None:
        recorder = _Recorder(building, records)
        engine.deepspeed.checkpoint_engine.save = recorder.save
        # Its copies of conversion scripts are not wanted, and could fail outside the recorder.
        engine.deepspeed._copy_recovery_script = lambda directory: None
        # NOTE: ends in a barrier, so it must be reached by all ranks and must not raise on one:
        # the recorder keeps the error for after it.
        engine.deepspeed.save_checkpoint(str(building), tag=_ZERO, save_latest=False)

        def write_small_files() -> None:
            ours = building / "ranks" / f"rank_{self.world.rank:05d}.pt"
            random_state = rng_state()
            records.append(write_hashed(building, ours, lambda f: torch.save(random_state, f)))
            if self.world.is_main:
                texts = {TRAINER_STATE: json.dumps(state, indent=1), CONFIG: config_yaml}
                for file_name, text in texts.items():
                    records.append(write_text(building, building / file_name, text))

        return recorder.error or _attempt(write_small_files)

    def _publish(self, building: Path, name: str, records: list[FileRecord]) -> None:
        manifest = {record.path: [record.size, record.sha256] for record in records}
        write_text(building, building / MANIFEST, json.dumps({"files": manifest}, indent=1))
        for folder in {(building / path).parent for path in manifest}:
            _fsync_directory(folder)
        building.rename(self.folder / name)
        _fsync_directory(self.folder)

    def _tidy(self, name: str) -> None:
        """Point `latest` to the new checkpoint, and delete the old ones."""
        pointer = self.folder / f"{_BUILDING}{LATEST}"
        write_text(self.folder, pointer, f"{name}\n")
        pointer.replace(self.folder / LATEST)
        _fsync_directory(self.folder)
        self._prune()

    def _prune(self) -> None:
        """Delete all but the `keep_last` newest; a damaged one does not count as kept."""
        kept = 0
        for name in reversed(step_names(self.folder)):
            directory = self.folder / name
            if kept >= self.keep_last:
                (directory / MANIFEST).unlink(missing_ok=True)  # first: a half-deleted one is bad
                shutil.rmtree(directory)
            elif find_fault(directory, hashes=False) is None:
                kept += 1


class _Recorder:
    """Writes DeepSpeed's files, hashed; keeps an error instead of leaving peers in a barrier."""

    def __init__(self, root: Path, records: list[FileRecord]) -> None:
        self.root = root
        self.records = records
        self.error: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file of this rank."""
        if self.error is None:
            self.error = _attempt(
                lambda: self.records.append(
                    write_hashed(self.root, Path(path), lambda f: torch.save(state_dict, f))
                )
            )


class _HashingWriter:
    """A binary file that hashes what is written to it, so that nothing is read back."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        """Write and hash `data` (bytes-like)."""
        written = self._file.write(data)
        self.hash.update(data)
        self.size += written
        return written

    def flush(self) -> None:
        """Flush the file; `torch.save` asks for it."""
        self._file.flush()


def write_hashed(root: Path, path: Path, write: Callable[[Any], object]) -> FileRecord:
    """Create `path` under `root` by `write(file)`, fsync it, return its size and hash."""
    with path.open("wb") as file:
        writer = _HashingWriter(file)
        write(writer)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(path.relative_to(root).as_posix(), writer.size, writer.hash.hexdigest())


def write_text(root: Path, path: Path, text: str) -> FileRecord:
    """Create a text file as `write_hashed` does."""
    return write_hashed(root, path, lambda file: file.write(text.encode()))


def step_names(folder: Path) -> list[str]:
    """Return the names of all step directories in `folder`, oldest first, verified or not."""
    return sorted(item.name for item in folder.iterdir() if _STEP_NAME.fullmatch(item.name))


def find_fault(directory: Path, rank: int = 0, ranks: int = 1, hashes: bool = True) -> str | None:
    """Return what is wrong with a checkpoint directory, or None if it is whole.

    Args:
        rank, ranks: check only every `ranks`-th file from the `rank`-th on, so that the ranks of
            a job share the reading; each checks the manifest itself.
        hashes: also read every byte; else sizes only.
    """
    try:
        files = json.loads((directory / MANIFEST).read_text())["files"]
        for name, (size, digest) in sorted(files.items())[rank::ranks]:
            path = directory / name
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


def read_trainer_state(directory: Path) -> dict[str, Any]:
    """Return the trainer's state of a checkpoint."""
    state: dict[str, Any] = json.loads((directory / TRAINER_STATE).read_text())
    return state


def rng_state() -> dict[str, Any]:
    """Return the state of every random generator of this process."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        # int64, which torch can save; the keys are uint32.
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_rng_state(directory: Path, rank: int) -> None:
    """Set the random generators of this process to what `rank` saved."""
    path = directory / "ranks" / f"rank_{rank:05d}.pt"
    state = torch.load(path, weights_only=True)
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def load_full_weights(directory: Path) -> dict[str, Tensor]:
    """Return all weights and buffers of a checkpoint, fp32 on the CPU, from any ZeRO stage.

    Needs no process group: for export and evaluation on any machine.

    Raises:
        ValueError: `directory` is no checkpoint, or is damaged.
    """
    fault = find_fault(directory)
    if fault:
        raise ValueError(f"{directory} is not a whole checkpoint: {fault}")
    if read_trainer_state(directory)["zero_stage"] == 3:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        sharded = get_fp32_state_dict_from_zero_checkpoint(str(directory), tag=_ZERO)
        return {name: tensor.clone() for name, tensor in sharded.items()}
    path = directory / _ZERO / "mp_rank_00_model_states.pt"
    module = torch.load(path, map_location="cpu", weights_only=False)["module"]
    # Cloned: the tensors are views of one flat buffer.
    return {name: tensor.float().clone() for name, tensor in module.items()}


def _attempt(action: Callable[[], object]) -> str | None:
    """Run `action`; return the message of a failure to read or write, or None."""
    try:
        action()
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into RuntimeError
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


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
