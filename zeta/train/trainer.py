"""The training loop: draw the packs of a step, agree, train, record, save.

Before the first forward of a step, all ranks agree on it in one small collective: the number of
images, whether a rank must stop or has failed, and whether data is left.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from zeta import metric_names as names
from zeta.distributed import World
from zeta.exit_codes import ExitCode, RunError, UnsavedError
from zeta.objectives import JointObjective, PackObjective
from zeta.objectives.base import Step
from zeta.packed import StepPacks, StepSource, check_world_size, merge_states
from zeta.random_state import derive_seed
from zeta.run.console import Console
from zeta.run.directory import RunDir
from zeta.run.ledger import Ledger, Quarantine, Streaks, check_budgets
from zeta.run.requests import RequestFiles
from zeta.run.signals import StopSignals, agreed_stop, stop_votes
from zeta.run.watchdog import PhaseWatch, Unwatched
from zeta.tracking.config import TrackerConfig, WandbConfig
from zeta.tracking.csv_sink import CsvSink
from zeta.tracking.sinks import (
    JsonlSink,
    MetricSink,
    NoSink,
    OnlyNew,
    SinkOfAll,
    WithAxes,
    last_logged_steps,
)
from zeta.tracking.tensorboard_sink import TensorBoardSink
from zeta.tracking.wandb_mode import stable_run_id
from zeta.tracking.wandb_sink import WandbSink
from zeta.train.config import OptimConfig, TrainConfig
from zeta.train.engine import StepResult, TrainEngine
from zeta.train.evaluation import HeldOut
from zeta.train.evaluation_schedule import Validation
from zeta.train.learned import check_learned
from zeta.train.probing.scores import ProbeImages
from zeta.train.resume import RunCheckpoints
from zeta.train.schedule import build_schedule
from zeta.train.straggler import Balance
from zeta.train.supply import SupplyWatch
from zeta.train.utilisation import Utilisation


@dataclass(frozen=True)
class StepVotes:
    """The numbers of one rank about a step before training on it, or their sums over all ranks."""

    images: int
    """Images that count in the loss."""
    tokens: int
    """Tokens of images, padding excluded."""
    budget: int
    """Token budgets of the packs."""
    rejected: int
    """Images that could not be used."""
    flops: int
    """Operations of training on the images."""
    more: int
    """Ranks that have samples left after this step."""
    save: int
    """Ranks that ask for a checkpoint: by the clock, or because a person asked for it."""
    writing: int
    """Ranks that are still writing the checkpoint that was begun."""
    failed: int
    """Ranks that could not draw their packs."""
    stop: Sequence[int]
    """Ranks that were asked to stop, by the reason (`zeta.run.signals.stop_votes`)."""

    def over_ranks(self, world: World) -> StepVotes:
        """Return the sums over all ranks; a collective."""
        *counts, stop = (getattr(self, field.name) for field in fields(self))
        sums = [int(value) for value in world.sum([*counts, *stop])]
        summed: list[Any] = [*sums[: len(counts)], sums[len(counts) :]]
        return StepVotes(*summed)


@dataclass(frozen=True)
class _Drawn:
    """A step that all ranks agree on, before it is trained."""

    packs: StepPacks | None
    """This rank's packs; None if it was asked to stop before it drew any."""
    votes: StepVotes
    """Sums over all ranks."""
    drawn_s: float
    """Seconds that this rank waited for its own packs."""
    written: bool
    """Whether a checkpoint was begun and every rank has written its files."""
    stop: ExitCode | None
    """Exit code if a rank was asked to stop; None: continue."""


class Trainer:
    """The training of a model from a StepSource into a run directory, with automatic resume."""

    def __init__(
        self,
        *,
        model: nn.Module,
        objective: PackObjective | JointObjective,
        source: StepSource,
        run_dir: RunDir,
        world: World,
        console: Console,
        train: TrainConfig,
        optim: OptimConfig,
        tracker: TrackerConfig,
        config: Mapping[str, Any],
        name: str = "zeta",
        watchdog: PhaseWatch | None = None,
        held_out: Sequence[HeldOut] = (),
        probe: ProbeImages | None = None,
        epoch_images: int | None = None,
        planned_end: int | None = None,
    ) -> None:
        """Build the engine and load the newest verified checkpoint of `run_dir`, if any.

        Args:
            model: called with a PackedBatch; built alike on every rank.
            objective: the loss; its `check` is applied to every pack.
            source: this rank's packs.
            run_dir: the same directory on every rank.
            world: the ranks.
            console: this rank's log and terminal.
            train: the loop.
            optim: optimizer and schedule.
            tracker: the services that metrics.jsonl is sent to.
            config: the whole resolved config, for the checkpoint and W&B.
            name: display name of the run.
            watchdog: is notified of the phase that this rank is in.
            held_out: images to evaluate on, at the size of training first.
            probe: labelled images to probe the encoder on.
            epoch_images: images of one pass over the data, by which a run by `max_epochs` knows
                what share of it is done.
            planned_end: length of a run by `max_epochs`, for its schedule: see `build_schedule`.

        Raises:
            ValueError: the configuration cannot work.
            RunError: the checkpoint does not fit it, or the installed DeepSpeed lacks something.
        """
        check_world_size(world.size, train.packs_per_step)
        self.schedule = build_schedule(optim, train, planned_end)
        self.learning_rate = 0.0
        self._blocked_s = 0.0  # by the checkpoint that is being saved
        self.objective, self.source, self.run_dir = objective, source, run_dir
        self.world, self.console, self._epoch_images = world, console, epoch_images
        self.train, self.optim = train, optim
        self.watchdog = watchdog or Unwatched()
        config_yaml = OmegaConf.to_yaml(OmegaConf.create(dict(config)))
        self.requests = RequestFiles(run_dir if world.is_main else None)
        self.checkpoints = RunCheckpoints(
            run_dir, world, console, train, optim, config_yaml, objective.facts()
        )
        if not self.checkpoints.prepare(model):
            objective.start(model)
        self.engine = TrainEngine(model, objective, world, train, optim)
        self.progress = self.checkpoints.resume(self.engine)
        self.utilisation = Utilisation(self.engine.module, world, train, console.message)
        self.balance = Balance(console.message)
        self.supply = SupplyWatch()
        self.ledger = Ledger(
            run_dir, world.rank, self.progress.step, world.size, self.train.max_epochs
        )
        self.streaks = Streaks()
        self.quarantine = Quarantine(run_dir.quarantine, world)
        self.sink = self._open_sink(tracker.kind)
        self.validation = Validation(
            held_out, train.evaluate, self.engine, run_dir, console, self.watchdog, probe
        )
        self.tracker = self._open_tracker(tracker.wandb, config, name)

    def fit(self) -> ExitCode:
        """Train until the run is finished or asked to stop, and return the exit code.

        Raises:
            RunError: a restart would fail the same way (bad label, loss not finite for
                `train.max_nonfinite_steps` steps in a row).
            UnsavedError: the run ended, but its last checkpoint could not be written.
        """
        outcome, why = "failed", ""
        try:
            code = self._fit()
            outcome = "finished" if code is ExitCode.FINISHED else "stopped"
        except Exception as error:
            why = str(error)
            raise
        finally:
            if self.tracker is not None:
                self.tracker.close(outcome, why)
        return code

    def _fit(self) -> ExitCode:
        share = self.progress.share_shown(self.train, self._epoch_images)
        progress, train = self.progress, self.train
        self.console.start(progress.step, train.max_steps, share, train.log_every)
        steps = iter(self.source.steps(self.progress.data))
        try:
            with StopSignals(self.requests.stop_asked) as signals:
                try:
                    code = self._loop(steps, signals)
                except RunError:  # raised on every rank: finish the save in progress
                    self._finish_save()
                    raise
                self._begin_save()
                if (error := self._finish_save()) is not None:
                    raise UnsavedError(
                        f"the last checkpoint could not be written ({error}): nothing after step "
                        f"{self.checkpoints.saved_step} is saved; free some space and start the "
                        "run again"
                    )
        finally:
            self.ledger.close()
            self.sink.close()
        if code is ExitCode.FINISHED and self.world.is_main:
            self.run_dir.finished.write_text(f"step {self.progress.step}\n")
        return code

    def _loop(self, steps: Iterator[StepPacks], signals: StopSignals) -> ExitCode:
        stop = self._validate(signals)  # an evaluation may have been stopped halfway
        while stop is None and not self._reached_end():
            started = time.perf_counter()
            step = self._draw(steps, signals)
            waited = time.perf_counter() - started
            if step.stop is not None:
                return step.stop
            if step.votes.images == 0 and not step.votes.more:
                break
            result = self._train(step)
            self._account(step, result, time.perf_counter() - started, waited)
            if self._reached_end() or not step.votes.more:
                self._log()
                break
            if self.progress.step % self.train.log_every == 0:
                self._log()
            if step.written:
                self._finish_save()
            stop = self._validate(signals)
            save = step.votes.save or self.checkpoints.due_at(self.progress.step)
            if stop is None and save:
                self._begin_save()
        if stop is None:
            check_learned(self.progress, self.run_dir.quarantine, finished=True)
            stop = self._validate(signals, at_end=True)
        return ExitCode.FINISHED if stop is None else stop

    def _validate(self, signals: StopSignals, *, at_end: bool = False) -> ExitCode | None:
        """Evaluate if it is due; return the exit code if a rank was asked to stop."""
        if not self.validation.is_due(self.progress, at_end=at_end):
            return None
        self._finish_save()  # an evaluation may take long, and its loader forks
        return self.validation.run(self.progress, signals, self.sink)

    # One step.

    def _draw(self, steps: Iterator[StepPacks], signals: StopSignals) -> _Drawn:
        """Draw this rank's packs of the next step, and agree on it with all ranks."""
        packs: StepPacks | None = None
        failure: Exception | None = None
        self.watchdog.enter("data", self.progress.step)
        began = time.perf_counter()
        if signals.requested is None:
            try:
                packs = next(steps)
                for pack in packs.packs:
                    self.objective.check(pack)
            except (RunError, OSError, ValueError, RuntimeError) as error:
                # A signal to the process group may have ended the loader's workers.
                failure = error if signals.requested is None else None
        requested, drawn_s = signals.requested, time.perf_counter() - began
        self.watchdog.enter("train", self.progress.step)  # NOTE: waits for the data of all ranks
        by_clock = self.world.is_main and self.checkpoints.asked_by_clock()
        votes = StepVotes(
            images=packs.num_images if packs else 0,
            tokens=packs.num_tokens if packs else 0,
            budget=sum(pack.patches.shape[0] for pack in packs.packs) if packs else 0,
            rejected=packs.num_rejected if packs else 0,
            flops=int(self.utilisation.count(packs.packs)) if packs else 0,
            more=packs is not None and packs.more,
            save=by_clock or self.requests.save_asked(),
            writing=self.checkpoints.store.is_writing,
            failed=failure is not None,
            stop=stop_votes(requested),
        ).over_ranks(self.world)
        if votes.failed:
            self.world.raise_together(failure)
        written = self.checkpoints.store.saving is not None and not votes.writing
        return _Drawn(packs, votes, drawn_s, written, agreed_stop(votes.stop))

    def _train(self, step: _Drawn) -> StepResult | None:
        """Run the optimizer step; None if no rank has an image to learn from."""
        assert step.packs is not None
        unit = self.optim.schedule_by
        before: int = getattr(self.progress, unit)
        own = {"steps": 1, "images": step.votes.images, "tokens": step.votes.tokens}[unit]
        self.learning_rate = self.schedule.rate(before, before + own)
        if step.votes.images == 0:
            return None
        index = self.progress.step
        share = self.progress.share_shown(self.train, self._epoch_images)
        this = Step(index, derive_seed(self.train.seed, index), share)
        self.objective.begin_step(this)
        result = self.engine.train_step(
            step.packs.packs,
            step.votes.images,
            seeds=[derive_seed(self.train.seed, index, lane) for lane in step.packs.lanes],
            lr=self.learning_rate,
        )
        if result.applied:
            self.engine.follow_step(this)
        return result

    def _account(
        self, step: _Drawn, result: StepResult | None, seconds: float, waited: float
    ) -> None:
        """Commit the step: count it, record its samples, and end the run if a limit is exceeded."""
        progress, packs, votes = self.progress, step.packs, step.votes
        assert packs is not None
        progress.commit(
            images=votes.images,
            tokens=votes.tokens,
            rejected=votes.rejected,
            budget=votes.budget,
            flops=votes.flops,
            epoch=packs.epoch,
            result=result,
            seconds=seconds,
            waited=waited,
            device=self.engine.device_clock.take(),
        )
        forward_s, _ = self.engine.forward_clock.take()
        self.balance.add(step.drawn_s, forward_s)
        skipped = result is not None and not result.applied
        self.ledger.write(progress.step, packs, skipped)
        in_a_row = self.streaks.update(packs)
        if votes.rejected:
            news = self.quarantine.add(progress.step, packs.rejected, in_a_row)
            check_budgets(
                self.train.quarantine, news, images=progress.images, rejected=progress.rejected
            )
        if skipped:
            self._report_nonfinite()
        self.console.step(progress.step, progress.share_shown(self.train, self._epoch_images))

    def _report_nonfinite(self) -> None:
        progress = self.progress
        where = f"the samples are in {self.run_dir.ledger}, at the lines with skipped: true"
        self.console.message(
            f"step {progress.step}: loss or gradient is not finite, nothing was changed; {where}"
        )
        if progress.nonfinite_in_a_row >= self.train.max_nonfinite_steps:
            raise RunError(
                f"loss or gradient was not finite for {progress.nonfinite_in_a_row} steps in a row "
                f"(train.max_nonfinite_steps), up to step {progress.step}; {where}. Lower optim.lr "
                "or raise optim.warmup_steps, or look at those samples"
            )

    def _reached_end(self) -> bool:
        """Return whether the run has reached its number of steps, images or tokens."""
        share = self.progress.share_done(self.train)
        return share is not None and share >= 1

    # Metrics.

    def _log(self) -> None:
        """Log the steps since the last log."""
        step = self.progress.step
        loads = self.world.gather(self.balance.take(peak_memory_gib(self.world.device)))
        measured = self.progress.take_metrics(self.utilisation.peak)
        metrics: dict[str, float | str] = {
            **measured,
            **self.balance.metrics(loads),
            names.LEARNING_RATE: self.learning_rate,
            names.QUARANTINED: self.quarantine.count,
            names.PEAK_GIB: max(load.peak_gib for load in loads),
            names.CHECKPOINT_FAILURES: self.checkpoints.failures,
        }
        self.sink.log(step, metrics)
        self.console.metrics(step, metrics)
        seconds = measured[names.STEP_S] * self.train.log_every
        if warning := self.supply.warning(measured[names.SUPPLY_RATIO], seconds):
            self.console.message(warning)
        if self.tracker is not None:
            self.tracker.poll()

    def _open_sink(self, kinds: Collection[str]) -> MetricSink:
        if not self.world.is_main:
            return NoSink()
        path, progress = self.run_dir.metrics, self.progress
        notify = self.console.message
        sinks: list[MetricSink] = [JsonlSink(path, progress.step, notify)]
        if "csv" in kinds:
            sinks.append(CsvSink(self.run_dir.metrics_table, path, notify))
        if "tensorboard" in kinds:
            sinks.append(TensorBoardSink(self.run_dir.tensorboard, progress.step, notify))

        def axes(step: int) -> dict[str, float]:
            # The seconds of a checkpoint are known some steps later, when these have moved on.
            if step != progress.step:
                return {}
            return {names.IMAGES_SEEN: progress.images, names.TOKENS_SEEN: progress.tokens}

        # A step that is evaluated only after a restart has some of its metrics already.
        return OnlyNew(WithAxes(SinkOfAll(sinks), axes), last_logged_steps(path))

    def _open_tracker(
        self, config: WandbConfig, run_config: Mapping[str, Any], name: str
    ) -> WandbSink | None:
        if not self.world.is_main:
            return None
        return WandbSink(
            config,
            name=name,
            run_dir=self.run_dir,
            run_id=stable_run_id(self.run_dir.wandb_run_id, self.checkpoints.wandb_run_id),
            run_config={
                **run_config,
                "code": self.checkpoints.code,
                "world_size": self.world.size,
            },
            resumed_step=self.progress.step,
            notify=self.console.message,
        )

    # Checkpoints.

    def _begin_save(self) -> None:
        """Begin to save the committed state, unless it has been saved already."""
        self._finish_save()
        self.requests.taken()
        progress = self.progress
        if progress.step == self.checkpoints.saved_step:
            self.requests.saved()
            return
        check_learned(progress, self.run_dir.quarantine)
        with self._blocked_by_save():
            states = self.world.gather(dict(self.source.state_after(progress.step - 1)))
            progress.data = merge_states(states)
            self.checkpoints.begin(self.engine, progress, before=self._flush_files)

    def _flush_files(self) -> None:
        """Write ledger and metrics of all committed steps to the disk."""
        self.ledger.flush()
        self.quarantine.flush()
        self.sink.flush()

    def _finish_save(self) -> str | None:
        """Publish the checkpoint that was begun, if any, once it is written; return any error."""
        if self.checkpoints.store.saving is None:
            return None
        with self._blocked_by_save():
            error = self.checkpoints.finish()
        self.requests.saved()
        seconds, self._blocked_s = self._blocked_s, 0.0
        if error is None:
            self.sink.log(self.progress.step, {names.CHECKPOINT_SAVE_S: seconds})
        return error

    @contextmanager
    def _blocked_by_save(self) -> Iterator[None]:
        self.watchdog.enter("save", self.progress.step)
        started = time.perf_counter()
        yield
        self._blocked_s += time.perf_counter() - started


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process so far, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, else KiB
