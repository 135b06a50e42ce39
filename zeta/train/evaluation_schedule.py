"""Evaluation during training: its schedule, its metrics, and the best step so far."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from zeta import metric_names as names
from zeta.exit_codes import ExitCode
from zeta.packed import Rejected
from zeta.run.console import Console
from zeta.run.directory import RunDir
from zeta.run.ledger import Quarantine
from zeta.run.signals import StopSignals
from zeta.run.watchdog import PhaseWatch
from zeta.tracking.sinks import MetricSink
from zeta.train.collapse import CollapseWatch
from zeta.train.config import EvaluateConfig
from zeta.train.engine import TrainEngine
from zeta.train.evaluation import Evaluation, HeldOut, evaluate
from zeta.train.probing.rounds import ProbeRound, ProbeRounds
from zeta.train.probing.scores import ProbeImages
from zeta.train.progress import Progress


class Validation:
    """The evaluation of a run on held-out images.

    If the run keeps a moving average of the weights, it is scored too, at the size of training.

    Args:
        held_out: the images at each size, that of training first; without them and `probe`, nothing
            is ever due.
        config: steps between two evaluations.
        engine: the model and its objective.
        run_dir: directory with the list of images that cannot be used.
        console: shows progress and results.
        watchdog: is notified of every pack.
        probe: labelled images to probe the encoder on; None: it is not probed.
    """

    def __init__(
        self,
        held_out: Sequence[HeldOut],
        config: EvaluateConfig,
        engine: TrainEngine,
        run_dir: RunDir,
        console: Console,
        watchdog: PhaseWatch,
        probe: ProbeImages | None = None,
    ) -> None:
        self._held_out, self._config, self._engine = held_out, config, engine
        self._probe: ProbeRounds | None = None
        if probe is not None:
            self._probe = ProbeRounds(probe, config.every, engine, console, watchdog)
        self._world, self._console, self._watchdog = engine.world, console, watchdog
        self._path = run_dir.val_quarantine
        self._quarantine = Quarantine(self._path, self._world)
        self._collapse = CollapseWatch()
        if held_out:
            console.message(
                f"evaluating on {held_out[0].images:,} held-out images every {config.every:,} steps"
            )

    def is_due(self, progress: Progress, *, at_end: bool) -> bool:
        """Return whether this step's weights must still be evaluated; the same on all ranks."""
        if not (self._held_out or self._probe) or progress.step == 0:
            return False
        if progress.validated_step == progress.step:
            return False
        return at_end or progress.step % self._config.every == 0

    def run(self, progress: Progress, signals: StopSignals, sink: MetricSink) -> ExitCode | None:
        """Evaluate at every size, log the scores and note them in `progress`.

        Every rank calls this. If one was asked to stop before the end, nothing is logged or noted,
        so that the resumed run evaluates this step.

        Returns:
            The exit code if a rank was asked to stop; else None.
        """
        started = time.perf_counter()
        metrics, shown, rejected = dict[str, float](), dict[str, float](), list[Rejected]()
        at_size: dict[str, float] = {}
        headline = self._engine.objective.headline
        views = [(held_out, False) for held_out in self._held_out]
        if self._engine.average is not None:
            views += [(held_out, True) for held_out in self._held_out[:1]]
        for held_out, average in views:
            found = self._evaluate(held_out, progress.step, signals, average=average)
            if isinstance(found, ExitCode):
                return found
            for name, value in found.scores.items():
                metrics[names.val_score(name, held_out.tokens, average=average)] = value
            at = "" if held_out.tokens is None else f"@{held_out.tokens}"
            if headline is not None:
                label = f"{headline}{at}{' of average' if average else ''}"
                shown[label] = found.scores[headline]
            rejected += found.rejected_here
            if held_out is self._held_out[0] and not average:
                at_size = dict(found.scores)
            if held_out is self._held_out[0]:
                metrics[names.VAL_IMAGES] = found.images
                metrics[names.VAL_REJECTED] = found.rejected + held_out.unusable
        nothing = ProbeRound({}, {}, {})
        probed = nothing if self._probe is None else self._probe.run(progress.step, signals)
        if isinstance(probed, ExitCode):
            return probed
        metrics = probed.metrics | metrics
        self._list_rejected(rejected, progress.step)
        value = shown.get(headline or "", math.nan)
        fingerprint = self._held_out[0].fingerprint if self._held_out else ""
        progress.note_evaluation(fingerprint, value)
        best = ""
        if headline is not None and progress.best_value is not None:
            metrics[names.val_best(headline)] = progress.best_value
            metrics[names.VAL_BEST_STEP] = progress.best_step
            best = f"best {progress.best_value:>7.2%} at step {progress.best_step}"
        metrics[names.EVALUATION_S] = time.perf_counter() - started
        sink.log(progress.step, metrics)
        scores = probed.spread | at_size
        measures = _shown_measures(scores, headline)
        self._console.evaluation(progress.step, measures, shown | probed.shown, best)
        # The embeddings of a few classes may well vary in few directions.
        if headline is None and (warning := self._collapse.warning(scores)):
            self._console.message(warning)
        return None

    def _evaluate(
        self, held_out: HeldOut, step: int, signals: StopSignals, *, average: bool
    ) -> Evaluation | ExitCode:
        def show(done: int) -> None:
            self._watchdog.enter("evaluate", step)
            self._console.evaluating(done, held_out.images)

        show(0)
        with self._engine.evaluating(average=average) as predict:
            return evaluate(
                predict,
                self._engine.objective,
                held_out.open(),
                self._world,
                requested=lambda: signals.requested,
                show=show,
            )

    def _list_rejected(self, rejected: Sequence[Rejected], step: int) -> None:
        """List the images that could not be used, and log a message if there are new ones."""
        if not self._world.sum([len(rejected)])[0]:
            return
        before = self._quarantine.count
        news = self._quarantine.add(step, rejected, 0)
        if self._quarantine.count > before:
            self._console.message(
                f"{self._quarantine.count:,} held-out images could not be used, the last was "
                f"{news.last}; all are in {self._path}"
            )


def _shown_measures(scores: Mapping[str, float], headline: str | None) -> dict[str, float]:
    """Return what the terminal shows of an objective's scores besides its headline score.

    An objective without a headline, such as one without labels, shows all its scores.
    """
    shown = ["loss"] if headline is not None else list(scores)
    return {f"val {name.replace('_', ' ')}": scores[name] for name in shown if name in scores}
