"""The checkpoints of a run: their schedule, the content of trainer.json, and the resume."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zeta.checkpoint.directory import (
    RANKS,
    check_same_model,
    read_trainer_state,
    require_entries,
)
from zeta.checkpoint.store import CheckpointStore
from zeta.distributed import World
from zeta.exit_codes import RunError
from zeta.models.parameters import parameter_shapes
from zeta.models.trainable import frozen_names
from zeta.random_state import derive_seed, restore_random_state, seed_everything
from zeta.run.code_version import code_version
from zeta.run.console import Console
from zeta.run.directory import RunDir
from zeta.train.config import OptimConfig, TrainConfig
from zeta.train.engine import TrainEngine
from zeta.train.init_from import load_frozen_weights, load_initial_weights
from zeta.train.optimizers.table import optimizer_name
from zeta.train.progress import Progress


class RunCheckpoints:
    """The checkpoints of one run; all ranks prepare, resume, begin and finish together."""

    def __init__(
        self,
        run_dir: RunDir,
        world: World,
        console: Console,
        train: TrainConfig,
        optim: OptimConfig,
        config_yaml: str,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        """Open the checkpoints of `run_dir`; nothing is read yet.

        Args:
            run_dir: the same directory on every rank.
            world: the ranks.
            console: this rank's log and terminal.
            train: when to save, and how many checkpoints to keep.
            optim: the optimizer, whose state is in the checkpoints.
            config_yaml: the resolved config, which goes into every checkpoint.
            facts: what the objective holds besides the model, which no resume may change.
        """
        self.run_dir, self.world, self.console, self.train = run_dir, world, console, train
        self.config_yaml, self._facts = config_yaml, dict(facts or {})
        self.store = CheckpointStore(
            run_dir.checkpoints, world, train.keep_last, train.keep_every, say=console.message
        )
        self.saved_step = 0
        """Committed steps of the newest good checkpoint."""
        self.failures = 0
        """Saves that failed since this process started."""
        self.code = code_version() if world.is_main else None
        """Version of the code that trains the run; known to rank 0."""
        self.wandb_run_id: str | None = None
        """W&B id of the run, from the checkpoint that it continues."""
        self._found: tuple[Path, dict[str, Any]] | None = None
        self._optimizer = optimizer_name(optim.kind)
        self._last_attempt = time.monotonic()

    def asked_by_clock(self) -> bool:
        """Return whether `train.checkpoint_minutes` have passed, by this rank's clock.

        Clocks differ, so rank 0's decides.
        """
        minutes = self.train.checkpoint_minutes
        return minutes is not None and time.monotonic() - self._last_attempt >= 60 * minutes

    def due_at(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step` committed steps, apart from the clock."""
        intervals = (self.train.checkpoint_every, self.train.keep_every)
        return any(every is not None and step % every == 0 for every in intervals)

    def prepare(self, model: nn.Module) -> bool:
        """Set the first weights of `model`, before its engine is built; a collective.

        A run with a checkpoint takes the frozen weights from it, and `resume` loads the rest. A run
        without one starts from the weights of `train.init_from`, if that is set.

        Returns:
            Whether the run continues from a checkpoint.

        Raises:
            RunError: the checkpoint, or `train.init_from`, is of another model.
        """
        check_alike(self.world.gather(self._facts))
        found = self.store.newest_verified()
        if found is None:
            if self.train.init_from is not None:
                self._begin_at(model, self.train.init_from)
            return False
        saved = read_trainer_state(found)
        require_entries(found, saved, "progress", "parameters", "world_size", "zero_stage")
        check_same_model(saved["parameters"], parameter_shapes(model), str(found))
        check_same_optimizer(saved.get("optimizer", "AdamW"), self._optimizer, str(found))
        check_same_facts(saved.get("objective", {}), self._facts, str(found))
        load_frozen_weights(model, found, self.world)
        self._found = found, saved
        return True

    def resume(self, engine: TrainEngine) -> Progress:
        """Load the checkpoint that `prepare` found into `engine`, and return the run's progress.

        The random generators of this process continue too, if the same number of ranks saved them.
        """
        progress = Progress()
        if self._found is not None:
            folder, saved = self._found
            self.store.load(folder, engine)
            progress = Progress.from_saved(saved["progress"])
            self.wandb_run_id = saved.get("wandb_run_id")
            self.console.message(f"continuing from {folder.name}")
        if self._found is not None and saved["world_size"] == self.world.size:
            own = folder / RANKS / f"rank_{self.world.rank:05d}.pt"
            try:
                restore_random_state(own)
            except ValueError as error:
                raise RunError(
                    f"{error}; move {folder} away to go on from the checkpoint before it"
                ) from error
        else:
            seed_everything(derive_seed(self.train.seed, progress.step, self.world.rank))
        self.saved_step = progress.step
        return progress

    def _begin_at(self, model: nn.Module, path: str) -> None:
        new_head = self.train.new_head
        left, note = load_initial_weights(model, path, self.world, new_head=new_head)
        message = f"initialised from {path} (train.init_from)"
        if left:
            why = "keep their initial values, as their shapes differ there"
            if new_head:
                why = "begin at zero (train.new_head)"
            message += f", except that {' and '.join(left)} {why}"
        self.console.message(f"{message}; {note}" if note else message)

    def begin(self, engine: TrainEngine, progress: Progress, before: Callable[[], object]) -> None:
        """Copy the committed state, and begin to write it; the previous save must be finished.

        If `before` raises OSError, for example on a full disk, the checkpoint fails.
        """
        self._last_attempt = time.monotonic()
        state = self._trainer_state(engine, progress)
        self.store.begin(engine, progress.step, state, self.config_yaml, before)

    def finish(self) -> str | None:
        """Wait for the checkpoint that was begun; a failure is logged, counted and returned."""
        step, error = self.store.saving, self.store.finish()
        assert step is not None
        if error is None:
            self.saved_step = step
        else:
            self.failures += 1
            good = f"the last good one is of step {self.saved_step}"
            self.console.message(
                f"WARNING: the checkpoint of step {step} could not be written ({error}); "
                f"{good if self.saved_step else 'there is no earlier one'}"
            )
        return error

    def _trainer_state(self, engine: TrainEngine, progress: Progress) -> dict[str, Any]:
        """Return the content of trainer.json, without the entries that the store adds."""
        run_id = self.run_dir.wandb_run_id
        return {
            "progress": asdict(progress),
            "world_size": self.world.size,
            "zero_stage": self.train.lowest_stage,
            "optimizer": self._optimizer,
            **({"objective": self._facts} if self._facts else {}),
            "average_updates": None if engine.average is None else engine.average.updates,
            "wandb_run_id": run_id.read_text().strip() if run_id.exists() else None,
            "code": self.code,
            "versions": {
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                **engine.sharded.versions,
            },
            "parameters": parameter_shapes(engine.module),
            "frozen": frozen_names(engine.module),
        }


def check_same_optimizer(saved: str, wanted: str, checkpoint: str) -> None:
    """Raise RunError unless the optimizers, named by their types, are the same."""
    if saved != wanted:
        raise RunError(
            f"{checkpoint} has the state of {saved}, but optim.kind asks for "
            f"{wanted}; continue with {saved}, or begin another run at these weights "
            "(train.init_from)"
        )


def check_same_facts(saved: Mapping[str, str], wanted: Mapping[str, str], checkpoint: str) -> None:
    """Raise RunError unless the digests of what the objective holds are those in a checkpoint."""
    for field, digest in wanted.items():
        if saved.get(field, digest) != digest:
            raise RunError(
                f"{field} is not what the run in {checkpoint} learned from: its weights have the "
                f"digest {digest[:12]}, and those of before had {saved[field][:12]}. Give the "
                "folder of before, or choose another run.dir"
            )


def check_alike(facts: Sequence[Mapping[str, str]]) -> None:
    """Raise RunError unless all ranks hold the same."""
    for rank, own in enumerate(facts):
        for field, digest in own.items():
            if facts[0].get(field) != digest:
                raise RunError(
                    f"{field} is another model on rank {rank} than on rank 0: give a folder on "
                    "storage that every node sees"
                )
