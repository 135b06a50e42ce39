"""The progress of a run, and the metrics of the steps since the last log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zeta import metric_names as names
from zeta.files import as_record
from zeta.train.config import UNITS, TrainConfig
from zeta.train.device_clock import DeviceTime
from zeta.train.engine import StepResult


@dataclass
class Progress:
    """The counts of committed steps and the data state from which a resumed run continues."""

    step: int = 0
    """Committed optimizer steps."""
    images: int = 0
    """Images trained on, over all ranks."""
    rejected: int = 0
    """Images that could not be used, counted again in every epoch."""
    tokens: int = 0
    """Tokens trained on, over all ranks."""
    epoch: int = 0
    """Lowest epoch of the last step's samples."""
    skipped_steps: int = 0
    """Steps that changed nothing, because their loss or gradient was not finite."""
    nonfinite_in_a_row: int = 0
    since_log: dict[str, float] = field(default_factory=dict)
    """Sums since the last log, so that a resumed run logs what an uninterrupted one would."""
    validated_step: int = 0
    """Step whose weights were evaluated last; 0: no step yet."""
    validated_on: str = ""
    """Fingerprint of the held-out images of that evaluation."""
    best_value: float | None = None
    """Best value so far of the objective's headline score on those images; None: no evaluation."""
    best_step: int = 0
    """Step of the best value."""
    data: dict[str, Any] | None = None
    """Merged state of all lanes after the last committed step; None: before the first step."""

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> Progress:
        """Return the progress that `dataclasses.asdict` made for a checkpoint of any format.

        Raises:
            ValueError: a field is missing, not known, or of another type; names it.
        """
        fields = dict(saved)
        if "window" in fields:  # its name in format 1
            fields["since_log"] = fields.pop("window")
        what = "move this checkpoint away to go on from the one before it"
        return as_record(cls, fields, place="progress in trainer.json", what=what)

    @property
    def steps(self) -> int:
        """Committed steps, under the name of the unit; `images` and `tokens` are the others."""
        return self.step

    def share_done(self, train: TrainConfig) -> float | None:
        """Return the share of the run that is done, by the nearest of its limits; at 1 it ends.

        Returns None if the run ends with the data, after `max_epochs`, or not at all.
        """
        limits = ((getattr(self, unit), getattr(train, f"max_{unit}")) for unit in UNITS)
        return max((done / most for done, most in limits if most is not None), default=None)

    def share_shown(self, train: TrainConfig, epoch_images: int | None) -> float | None:
        """Return the share of the run that is done, `max_epochs` counted as well.

        Epochs end with the data, not at a count: the share may be 1 just before that, or below it.

        Args:
            train: the limits of the run.
            epoch_images: images of one pass over the data; None: not known.
        """
        share = self.share_done(train)
        if train.max_epochs is None or epoch_images is None:
            return share
        by_epochs = (self.images + self.rejected) / (train.max_epochs * epoch_images)
        return max(share or 0.0, min(by_epochs, 1.0))

    def commit(
        self,
        *,
        images: int,
        tokens: int,
        rejected: int,
        budget: int,
        flops: float,
        epoch: int,
        result: StepResult | None,
        seconds: float,
        waited: float,
        device: DeviceTime,
    ) -> None:
        """Count one step.

        Args:
            images: images of all ranks that count in the loss.
            tokens: their tokens.
            rejected: images of all ranks that could not be used.
            budget: token budgets of all packs of all ranks.
            flops: operations of training on the images of all ranks.
            epoch: lowest epoch of the step's samples.
            result: outcome of the engine's step; None if there was no image to learn from.
            seconds: wall time of the step on this rank.
            waited: seconds of it that were spent waiting for data.
            device: time of the device since the step before.
        """
        self.step += 1
        self.images += images
        self.tokens += tokens
        self.rejected += rejected
        self.epoch = epoch
        sums = {"steps": 1, "seconds": seconds, "waited": waited}
        sums |= {"device": device.device_s, "device_steps": device.steps}
        sums["host"] = max(0.0, seconds - waited - device.waited_s)
        sums |= {"seen": images, "tokens": tokens, "budget": budget, "flops": flops}
        if result is not None and result.applied:
            sums |= {"learned": images, "loss": result.loss_sum}
            sums |= {f"count/{name}": value for name, value in result.counts.items()}
            self.since_log["grad_norm"] = result.grad_norm
        if result is not None:
            self.nonfinite_in_a_row = 0 if result.applied else self.nonfinite_in_a_row + 1
            self.skipped_steps += not result.applied
        for key, value in sums.items():
            self.since_log[key] = self.since_log.get(key, 0.0) + value

    def note_evaluation(self, fingerprint: str, headline: float) -> None:
        """Note that the weights of this step were evaluated.

        Args:
            fingerprint: fingerprint of the held-out images; a new one starts a new best value.
            headline: the score by which the best step is chosen.
        """
        if fingerprint != self.validated_on:
            self.best_value = None
        self.validated_step, self.validated_on = self.step, fingerprint
        if math.isfinite(headline) and (self.best_value is None or headline > self.best_value):
            self.best_value, self.best_step = headline, self.step

    def take_metrics(self, peak_flops: float | None = None) -> dict[str, float]:
        """Return the metrics of the steps since the last call, by name.

        Losses and counts are means over images; rates are over the time of steps, without saves.

        Args:
            peak_flops: peak operations a second of all ranks; None: MFU is not reported.
        """
        sums, self.since_log = self.since_log, {}
        seconds = max(sums["seconds"], 1e-9)
        metrics: dict[str, float] = {
            names.SKIPPED_STEPS: self.skipped_steps,
            names.IMAGES_PER_S: sums["seen"] / seconds,
            names.TOKENS_PER_S: sums["tokens"] / seconds,
            names.STEP_S: seconds / sums["steps"],
            names.DATA_WAIT_S: sums["waited"] / sums["steps"],
            names.SUPPLY_RATIO: 1 - min(1.0, sums["waited"] / seconds),
            names.FILL: sums["tokens"] / sums["budget"],
            names.IMAGES_SEEN: self.images,
            names.TOKENS_SEEN: self.tokens,
            names.EPOCH: self.epoch,
        }
        if "host" in sums:  # not in sums that an older version saved
            metrics[names.HOST_S] = sums["host"] / sums["steps"]
        if sums.get("device_steps"):
            metrics[names.DEVICE_S] = sums["device"] / sums["device_steps"]
        if peak_flops is not None:  # sums that an older version saved have no flops
            metrics[names.MFU] = sums.get("flops", 0.0) / seconds / peak_flops
        if "learned" in sums:
            metrics[names.TRAIN_LOSS] = sums["loss"] / sums["learned"]
            metrics[names.GRAD_NORM] = sums["grad_norm"]
            for key in sums:
                group, _, name = key.partition("/")
                if group == "count":
                    metrics[names.train_mean(name)] = sums[key] / sums["learned"]
        return metrics
