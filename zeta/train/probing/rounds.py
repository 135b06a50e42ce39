"""The probes of a run at an evaluation: each kind of weights, names of the scores, and messages."""

from __future__ import annotations

from dataclasses import dataclass

from zeta import metric_names as names
from zeta.exit_codes import ExitCode
from zeta.run.console import Console
from zeta.run.signals import StopSignals
from zeta.run.watchdog import PhaseWatch
from zeta.train.engine import TrainEngine
from zeta.train.probing.encoder import encoder_of
from zeta.train.probing.scores import (
    CLASSIFIER_WORDS,
    SCORES,
    ProbeImages,
    ProbeScores,
    probe_scores,
)


@dataclass(frozen=True)
class ProbeRound:
    """The scores of the probes at one step, the same on every rank."""

    metrics: dict[str, float]
    """By metric name."""
    shown: dict[str, float]
    """By display name."""
    spread: dict[str, float]
    """How the embeddings of the weights that train are spread, by name."""


class ProbeRounds:
    """The probes of a run.

    Args:
        images: the labelled images.
        every: steps between two evaluations, for the console.
        engine: the model that trains; if it keeps a moving average, that is probed too.
        console: shows progress and messages.
        watchdog: is notified of every pack.
    """

    def __init__(
        self,
        images: ProbeImages,
        every: int,
        engine: TrainEngine,
        console: Console,
        watchdog: PhaseWatch,
    ) -> None:
        self._images, self._engine = images, engine
        self._console, self._watchdog = console, watchdog
        self._encoder = encoder_of(engine.module, images.encoder)
        self._rejected = 0
        words = " and ".join(CLASSIFIER_WORDS[name] for name in images.classifiers)
        learn, classify = ("learn", "classify") if " and " in words else ("learns", "classifies")
        console.message(
            f"{words} {learn} from {images.train.images:,} images of {images.names[0]} and "
            f"{classify} {images.test.images:,} of {images.names[1]} every {every:,} steps"
        )

    def run(self, step: int, signals: StopSignals) -> ProbeRound | ExitCode:
        """Probe the encoder; every rank calls this.

        Returns:
            The scores, or the exit code if a rank was asked to stop before the end.
        """
        found = ProbeRound({}, {}, {})
        for average in (False, True) if self._engine.average is not None else (False,):
            probed = self._probe(step, signals, average=average)
            if isinstance(probed, ExitCode):
                return probed
            which = " of average" if average else ""
            if probed.fault:
                self._console.message(
                    f"WARNING: step {step:,} has no scores of the probes{which}: {probed.fault}. "
                    "The usual causes: optim.lr too high, or weights of train.init_from that are "
                    "not finite"
                )
            for name in self._images.classifiers if probed.scores else ():
                score = probed.scores[SCORES[name]]
                found.metrics[names.val_score(SCORES[name], average=average)] = score
                found.shown[f"{CLASSIFIER_WORDS[name]}{which}"] = score
            for name, value in probed.spread.items():
                found.metrics[names.val_score(name, average=average)] = value
            if not average:
                found.spread.update(probed.spread)
            self._say_rejected(probed)
        return found

    def _probe(self, step: int, signals: StopSignals, *, average: bool) -> ProbeScores | ExitCode:
        def show(done: int) -> None:
            self._watchdog.enter("evaluate", step)
            self._console.evaluating(done, self._images.images)

        show(0)
        with self._engine.embedding(self._encoder, average=average) as embed:
            return probe_scores(
                embed,
                self._images,
                self._engine.world,
                requested=lambda: signals.requested,
                show=show,
            )

    def _say_rejected(self, probed: ProbeScores) -> None:
        """Say how many images could not be used, whenever there are more than before."""
        if len(probed.rejected) <= self._rejected:
            return
        self._rejected, last = len(probed.rejected), probed.rejected[-1]
        self._console.message(
            f"{self._rejected:,} images of the probes could not be used, the last was {last.key} "
            f"in {last.shard}: {last.reason}"
        )
