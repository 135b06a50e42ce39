"""The checkpoints of a run: when one is due, what is in its trainer.json, how a run goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import deepspeed
import torch
from torch import nn

from zeta.checkpoint.directory import RANKS, check_same_model, read_trainer_state
from zeta.checkpoint.store import CheckpointStore
from zeta.distributed import World
from zeta.exit_codes import RunError
from zeta.models.parameters import parameter_shapes
from zeta.models.trainable import frozen_names
from zeta.objectives import JointObjective, PackObjective
from zeta.random_state import derive_seed, restore_random_state, seed_everything
from zeta.run.code_version import code_version
from zeta.run.console import Console
from zeta.run.directory import RunDir
from zeta.train.config import OptimConfig, TrainConfig
from zeta.train.engine import TrainEngine
from zeta.train.init_from import load_frozen_weights, load_initial_weights
from zeta.train.progress import Progress
from zeta.zero.passthrough import optimizer_name


class RunCheckpoints:
    """Saves and resumes one run; what begins, finishes and resumes is called by all ranks."""

    def __init__(
        self, run_dir: RunDir, world: World, console: Console, train: TrainConfig, config_yaml: str
    ) -> None:
        """Open the checkpoints of `run_dir`; nothing is read yet.

        Args:
            run_dir: the same directory on every rank.
            world: the ranks.
            console: this rank's log and terminal.
            train: when to save and what to keep.
            config_yaml: the resolved config, which goes into every checkpoint.
        """
        self.run_dir, self.world, self.console, self.train = run_dir, world, console, train
        self.config_yaml = config_yaml
        self.store = CheckpointStore(
            run_dir.checkpoints, world, train.keep_last, train.keep_every, say=console.message
        )
        self.saved_step = 0
        """Committed steps of the newest good checkpoint."""
        self.failures = 0
        """Saves that failed since this process started."""
        self.code = code_version() if world.is_main else None
        """What the run is trained by; known to rank 0."""
        self.wandb_run_id: str | None = None
        """W&B id of the run, in the checkpoint that it goes on from."""
        self._optimizer = optimizer_name(train.deepspeed)
        self._last_attempt = time.monotonic()

    def asked_by_clock(self) -> bool:
        """Whether it is time for a checkpoint by `train.checkpoint_minutes`, by this rank's clock.

        Clocks differ: the ranks agree on what rank 0 says.
        """
        minutes = self.train.checkpoint_minutes
        return minutes is not None and time.monotonic() - self._last_attempt >= 60 * minutes

    def due_at(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` committed steps, whatever the clock says."""
        intervals = (self.train.checkpoint_every, self.train.keep_every)
        return any(every is not None and step % every == 0 for every in intervals)

    def resume(
        self, model: nn.Module, objective: PackObjective | JointObjective, optim: OptimConfig
    ) -> tuple[TrainEngine, Progress]:
        """Build the engine, and load the newest verified checkpoint if there is one.

        A run without a checkpoint begins at the weights of `train.init_from`, if that is set.

        Raises:
            RunError: the checkpoint, or what `train.init_from` names, is of another model.
        """
        found = self.store.newest_verified()
        saved = None if found is None else read_trainer_state(found)
        if found is not None and saved is not None:
            check_same_model(saved["parameters"], parameter_shapes(model), str(found))
            check_same_optimizer(saved.get("optimizer", "AdamW"), self._optimizer, str(found))
            load_frozen_weights(model, found, self.world)
        elif self.train.init_from is not None:
            self._begin_at(model, self.train.init_from)
        engine = TrainEngine(model, objective, self.world, self.train, optim)
        progress = Progress()
        if found is not None and saved is not None:
            self.store.load(found, engine)
            progress = Progress(**saved["progress"])
            self.wandb_run_id = saved.get("wandb_run_id")
            self.console.message(f"continuing from {found.name}")
        if found is not None and saved is not None and saved["world_size"] == self.world.size:
            restore_random_state(found / RANKS / f"rank_{self.world.rank:05d}.pt")
        else:
            seed_everything(derive_seed(self.train.seed, progress.step, self.world.rank))
        self.saved_step = progress.step
        return engine, progress

    def _begin_at(self, model: nn.Module, path: str) -> None:
        new_head = self.train.new_head
        left, note = load_initial_weights(model, path, self.world, new_head=new_head)
        why = "of another shape there, as initialised"
        if new_head:
            why = "new, and zero (train.new_head)"
        but = f", but {' and '.join(left)}: {why}" if left else ""
        but += f"; {note}" if note else ""
        self.console.message(f"the weights are those of {path} (train.init_from){but}")

    @property
    def saving(self) -> int | None:
        """Committed steps of the checkpoint that was begun and is not finished; None: none is."""
        return self.store.saving

    @property
    def is_writing(self) -> bool:
        """Whether this rank would wait for its disk in `finish`."""
        return self.store.is_writing

    def begin(self, engine: TrainEngine, progress: Progress, before: Callable[[], object]) -> None:
        """Copy the committed state, and begin to write it; the one before must be finished.

        Where `before` raises OSError, as of a full disk, the checkpoint fails.
        """
        self._last_attempt = time.monotonic()
        state = self._trainer_state(engine, progress)
        self.store.begin(engine, progress.step, state, self.config_yaml, before)

    def finish(self) -> str | None:
        """Wait for the one that was begun; a failure is said, counted and returned."""
        step, error = self.saving, self.store.finish()
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
        """Return what trainer.json holds."""
        run_id = self.run_dir.wandb_run_id
        return {
            "progress": asdict(progress),
            "world_size": self.world.size,
            "zero_stage": self.train.zero_stage,
            "optimizer": self._optimizer,
            "average_updates": None if engine.average is None else engine.average.updates,
            "wandb_run_id": run_id.read_text().strip() if run_id.exists() else None,
            "code": self.code,
            "versions": {
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
            },
            "parameters": parameter_shapes(engine.module),
            "frozen": frozen_names(engine.module),
        }


def check_same_optimizer(saved: str, wanted: str, checkpoint: str) -> None:
    """Raise RunError unless the optimizers, named by their types, are the same."""
    if saved != wanted:
        raise RunError(
            f"{checkpoint} has the state of {saved}, but train.deepspeed.optimizer asks for "
            f"{wanted}; go on with {saved}, or begin another run at these weights "
            "(train.init_from)"
        )
