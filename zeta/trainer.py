"""The training loop: draw the packs of a step, agree, train, account, save.

Everything that decides what a step computes is agreed on by all ranks before its first forward,
in one small collective: how many images it has, whether some rank must stop, whether data is left.
"""

from __future__ import annotations

import hashlib
import random
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn

from zeta import metric_names as names
from zeta.checkpoint import CheckpointStore, read_trainer_state, restore_rng_state
from zeta.console import Console
from zeta.distributed import World
from zeta.engine import StepResult, TrainEngine
from zeta.exit_codes import ExitCode, RunError
from zeta.ledger import Ledger, Quarantine
from zeta.objectives import Objective
from zeta.packed import StepPacks, StepSource, merge_states
from zeta.run_dir import RunDir
from zeta.schedule import learning_rate
from zeta.sinks import FanOut, JsonlSink, MetricSink, last_logged_step
from zeta.stop_signals import StopSignals
from zeta.train_config import OptimConfig, TrackerConfig, TrainConfig
from zeta.wandb_sink import WandbSink, stable_run_id


@dataclass
class Progress:
    """Where the run is; what a checkpoint's trainer.json holds besides facts about the run."""

    step: int = 0
    """Committed optimizer steps."""
    images: int = 0
    tokens: int = 0
    epoch: int = 0
    skipped_steps: int = 0
    nonfinite_in_a_row: int = 0
    window: dict[str, float] = field(default_factory=dict)
    """Sums since the last log, so that a resumed run logs what an uninterrupted one would."""
    data: dict[str, Any] | None = None
    """Merged state of all lanes after the last committed step; None: the start of the data."""


@dataclass(frozen=True)
class _Agreed:
    """What all ranks know about a step before it is trained."""

    packs: StepPacks | None
    """This rank's packs; None if this rank stopped or failed before it drew any."""
    images: int = 0
    tokens: int = 0
    budget: int = 0
    rejected: int = 0
    more: bool = False
    stop: ExitCode | None = None


class Trainer:
    """Trains a model from a StepSource into a run directory, and resumes by itself."""

    def __init__(
        self,
        *,
        model: nn.Module,
        objective: Objective,
        source: StepSource,
        run_dir: RunDir,
        world: World,
        console: Console,
        train: TrainConfig,
        optim: OptimConfig,
        tracker: TrackerConfig,
        config: Mapping[str, Any],
        name: str = "zeta",
    ) -> None:
        """Build the engine and load the newest verified checkpoint of `run_dir`, if any.

        Args:
            model: called with a PackedBatch; built alike on every rank.
            objective: the loss; its `check` is applied to every pack.
            source: this rank's packs.
            run_dir: the same directory on every rank.
            config: the whole resolved config, for the checkpoint and W&B.
            name: display name of the run.

        Raises:
            ValueError: the configuration cannot work, or the checkpoint does not fit it.
        """
        if train.max_steps is None and train.max_epochs is None:
            raise ValueError("the run has no end; set train.max_steps or train.max_epochs")
        if world.size > train.packs_per_step:
            raise ValueError(
                f"{world.size} ranks but train.packs_per_step is {train.packs_per_step}: each rank "
                "needs a pack; start fewer ranks or raise train.packs_per_step"
            )
        learning_rate(0, optim, train.max_steps)
        self.objective, self.source, self.run_dir = objective, source, run_dir
        self.world, self.console = world, console
        self.train, self.optim = train, optim
        self.config_yaml = OmegaConf.to_yaml(OmegaConf.create(dict(config)))
        self.progress = Progress()
        self.checkpoint_failures = 0
        self.store = CheckpointStore(
            run_dir.checkpoints, world, train.keep_last, say=console.message
        )
        self.engine = self._resume(model)
        self.saved_step = self.progress.step
        self.ledger = Ledger(run_dir, world.rank, self.progress.step)
        self.quarantine = Quarantine(run_dir.quarantine, world)
        self.sink = self._open_sinks(tracker, config, name)

    def fit(self) -> ExitCode:
        """Train until the run is finished or asked to stop; return what to exit with.

        Raises:
            RunError: a restart would fail the same way (bad label, loss not finite for
                `train.max_nonfinite_steps` steps in a row).
        """
        self.console.start(self.progress.step, self.train.max_steps)
        steps = iter(self.source.steps(self.progress.data))
        code = ExitCode.FINISHED
        with StopSignals() as signals:
            while not self._reached_max_steps():
                started = time.perf_counter()
                step = self._draw(steps, signals)
                waited = time.perf_counter() - started
                if step.stop is not None:
                    code = step.stop
                    break
                if step.images == 0 and not step.more:
                    break
                result = self._train(step)
                self._account(step, result, time.perf_counter() - started, waited)
                finished = self._reached_max_steps() or not step.more
                if finished or self.progress.step % self.train.log_every == 0:
                    self._log()
                if not finished and self.progress.step % self.train.checkpoint_every == 0:
                    self._save()
                if finished:
                    break
            self._save()
        if code is ExitCode.FINISHED and self.world.is_main:
            self.run_dir.finished.write_text(f"step {self.progress.step}\n")
        self._close()
        return code

    # One step.

    def _draw(self, steps: Iterator[StepPacks], signals: StopSignals) -> _Agreed:
        """Draw this rank's packs of the next step, and agree on it with all ranks."""
        packs, failure = None, None
        if signals.requested is None:
            try:
                packs = next(steps)
                for pack in packs.packs:
                    self.objective.check(pack)
            except RunError as error:
                failure = str(error)
            except RuntimeError:
                # A signal to the process group may end the loader's workers before us.
                if signals.requested is None:
                    raise
        requested = signals.requested
        sums = self.world.sum(
            [
                packs.num_images if packs else 0,
                packs.num_tokens if packs else 0,
                sum(pack.patches.shape[0] for pack in packs.packs) if packs else 0,
                len(packs.rejected) if packs else 0,
                packs.more if packs else False,
                requested is ExitCode.REQUEUE,
                requested is ExitCode.INTERRUPTED,
                failure is not None,
            ]
        )
        images, tokens, budget, rejected, more, requeue, interrupt, failed = (int(v) for v in sums)
        if failed:
            # NOTE: every rank raises, else the others would wait for this one in a collective.
            failures: list[str | None] = self.world.gather(failure)
            raise RunError("; ".join(text for text in failures if text))
        stop = ExitCode.INTERRUPTED if interrupt else ExitCode.REQUEUE if requeue else None
        return _Agreed(packs, images, tokens, budget, rejected, more > 0, stop)

    def _train(self, step: _Agreed) -> StepResult | None:
        """Run the optimizer step; None if no rank has an image to learn from."""
        assert step.packs is not None
        if step.images == 0:
            return None
        return self.engine.train_step(
            step.packs.packs,
            step.images,
            seeds=[
                pack_seed(self.train.seed, self.progress.step, self._lane(index))
                for index in range(len(step.packs.packs))
            ],
            lr=learning_rate(self.progress.step, self.optim, self.train.max_steps),
        )

    def _account(
        self, step: _Agreed, result: StepResult | None, seconds: float, waited: float
    ) -> None:
        """Commit the step: count it, note its samples, and stop the run if it went wrong."""
        progress = self.progress
        packs = step.packs
        assert packs is not None
        progress.step += 1
        progress.images += step.images
        progress.tokens += step.tokens
        progress.epoch = packs.epoch
        skipped = result is not None and not result.applied
        self.ledger.write(
            progress.step, packs, [self._lane(i) for i in range(len(packs.packs))], skipped
        )
        if step.rejected:
            self.quarantine.add(progress.step, packs.rejected)
        window = progress.window
        sums = {"steps": 1, "seconds": seconds, "waited": waited}
        sums |= {"seen": step.images, "tokens": step.tokens, "budget": step.budget}
        if result is not None and result.applied:
            sums |= {"images": step.images, "loss": result.loss_sum, **result.counts}
            window["grad_norm"] = result.grad_norm
        for key, value in sums.items():
            window[key] = window.get(key, 0.0) + value
        progress.nonfinite_in_a_row = progress.nonfinite_in_a_row + 1 if skipped else 0
        if skipped:
            self._report_nonfinite()
        self.console.step(progress.step)

    def _report_nonfinite(self) -> None:
        progress = self.progress
        progress.skipped_steps += 1
        where = f"the samples of the step are in {self.run_dir.ledger}/"
        self.console.message(
            f"step {progress.step}: loss or gradient is not finite; nothing was changed; {where}"
        )
        if progress.nonfinite_in_a_row >= self.train.max_nonfinite_steps:
            self._close()
            raise RunError(
                f"loss or gradient was not finite for {progress.nonfinite_in_a_row} steps in a row "
                f"(train.max_nonfinite_steps), up to step {progress.step}; {where}. Lower optim.lr "
                "or raise optim.warmup_steps, or look at those samples"
            )

    def _lane(self, index: int) -> int:
        """Lane of this rank's `index`-th pack: lane i belongs to rank i mod W."""
        return self.world.rank + index * self.world.size

    def _reached_max_steps(self) -> bool:
        return self.train.max_steps is not None and self.progress.step >= self.train.max_steps

    # Metrics.

    def _log(self) -> None:
        """Log the window since the last log, and start a new one."""
        window, progress = self.progress.window, self.progress
        peak = max(self.world.gather(peak_memory_gib(self.world.device)))
        seconds = max(window["seconds"], 1e-9)
        values: dict[str, float] = {
            names.LEARNING_RATE: learning_rate(progress.step - 1, self.optim, self.train.max_steps),
            names.SKIPPED_STEPS: progress.skipped_steps,
            names.IMAGES_PER_S: window["seen"] / seconds,
            names.TOKENS_PER_S: window["tokens"] / seconds,
            names.STEP_S: seconds / window["steps"],
            names.DATA_WAIT_S: window["waited"] / window["steps"],
            names.FILL: window["tokens"] / window["budget"],
            names.IMAGES_SEEN: progress.images,
            names.TOKENS_SEEN: progress.tokens,
            names.EPOCH: progress.epoch,
            names.QUARANTINED: self.quarantine.count,
            names.PEAK_GIB: peak,
            names.CHECKPOINT_FAILURES: self.checkpoint_failures,
        }
        if window.get("images"):
            values[names.TRAIN_LOSS] = window["loss"] / window["images"]
            values[names.GRAD_NORM] = window["grad_norm"]
            if "top1" in window:
                values[names.TRAIN_TOP1] = window["top1"] / window["images"]
        progress.window = {}
        self.sink.log(progress.step, values)
        self.console.metrics(progress.step, values)

    def _open_sinks(
        self, tracker: TrackerConfig, config: Mapping[str, Any], name: str
    ) -> MetricSink:
        if not self.world.is_main:
            return FanOut(())
        logged = last_logged_step(self.run_dir.metrics)
        return FanOut(
            (
                JsonlSink(self.run_dir.metrics, self.progress.step),
                WandbSink(
                    tracker.wandb,
                    name=name,
                    folder=self.run_dir.path,
                    run_id=stable_run_id(self.run_dir.wandb_run_id),
                    run_config=config,
                    last_logged_step=logged,
                ),
            )
        )

    def _close(self) -> None:
        self.ledger.close()
        self.sink.close()

    # Checkpoints.

    def _save(self) -> None:
        """Save the committed state, unless that was done; a failure is said and survived."""
        progress = self.progress
        if progress.step == self.saved_step:
            return
        started = time.perf_counter()
        states = self.world.gather(dict(self.source.state_after(progress.step - 1)))
        progress.data = merge_states(states)
        self.ledger.flush()
        error = self.store.save(self.engine, progress.step, self._state(), self.config_yaml)
        seconds = time.perf_counter() - started
        if error is None:
            self.saved_step = progress.step
            self.sink.log(progress.step, {names.CHECKPOINT_SAVE_S: seconds})
        else:
            self.checkpoint_failures += 1
            self.console.message(
                f"WARNING: the checkpoint of step {progress.step} could not be written ({error}); "
                f"training goes on, the last good one is step {self.saved_step}"
            )

    def _state(self) -> dict[str, Any]:
        return {
            "progress": asdict(self.progress),
            "world_size": self.world.size,
            "zero_stage": self.train.zero_stage,
            "parameters": parameter_shapes(self.engine.module),
            "wandb_run_id": self.world.broadcast(_read_if_exists(self.run_dir.wandb_run_id)),
            "versions": {
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
            },
        }

    def _resume(self, model: nn.Module) -> TrainEngine:
        """Build the engine, on the newest verified checkpoint if there is one."""
        found = self.store.newest_verified()
        if found is None:
            engine = TrainEngine(model, self.objective, self.world, self.train, self.optim)
            seed_everything(pack_seed(self.train.seed, -1, self.world.rank))
            return engine
        saved = read_trainer_state(found)
        check_same_model(saved["parameters"], parameter_shapes(model), found)
        layout = (saved["world_size"], saved["zero_stage"])
        wanted = (self.world.size, self.train.zero_stage)
        if layout[1] != wanted[1] and 0 in (layout[1], wanted[1]):
            raise ValueError(
                f"train.zero_stage is {wanted[1]}, but {found} was saved at stage {layout[1]}; "
                "stage 0 keeps its optimizer state unsharded and cannot change to or from the "
                f"others: set train.zero_stage={layout[1]}"
            )
        reshard = layout != wanted and wanted[1] > 0
        converted = self.store.convert(found) if reshard else None
        engine = TrainEngine(
            model, self.objective, self.world, self.train, self.optim, load_universal=reshard
        )
        self.store.load(found, engine, converted)
        if converted is not None:
            self.store.discard_converted(converted)
        self.progress = Progress(**saved["progress"])
        if layout[0] == self.world.size:
            restore_rng_state(found, self.world.rank)
        else:
            seed_everything(pack_seed(self.train.seed, self.progress.step, self.world.rank))
        self.console.message(f"continuing from {found.name}")
        return engine


def pack_seed(seed: int, step: int, lane: int) -> int:
    """Return the random seed of one pack's forward: the same whichever rank runs the lane."""
    digest = hashlib.blake2b(f"{seed}/{step}/{lane}".encode(), digest_size=7)
    return int.from_bytes(digest.digest(), "big")


def seed_everything(seed: int) -> None:
    """Seed every random generator of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def parameter_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Return name and full shape of every parameter, sharded or not."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in module.named_parameters()
    }


def check_same_model(
    saved: Mapping[str, list[int]], wanted: Mapping[str, list[int]], checkpoint: Path
) -> None:
    """Raise ValueError, naming the first difference, unless the parameters are the same."""
    for name in sorted({*saved, *wanted}):
        if saved.get(name) != wanted.get(name):
            raise ValueError(
                f"{checkpoint} is of another model: {name} is {saved.get(name, 'absent')} there "
                f"and {wanted.get(name, 'absent')} in this config; use another run.dir, or the "
                "model that the run began with"
            )


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory this process held so far, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux


def _read_if_exists(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None
