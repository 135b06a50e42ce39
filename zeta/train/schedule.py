"""Learning-rate schedules: pure functions of the steps, images or tokens trained on so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from zeta.train.config import UNITS, OptimConfig, TrainConfig

RAMPS = ("warmup", "cooldown")
"""Parts of a run in which the learning rate rises or falls in a line."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a run.

    A position is a count of `optim.schedule_by`: steps, images or tokens, each over all ranks. All
    schedules rise linearly to `optim.lr` over the warm-up: the first step already learns, and the
    step that ends at the warm-up is at the peak. Then

    - cosine falls to 0 at the end;
    - rsqrt is lr * sqrt(warm-up / position), the schedule of the ViT scaling and NaViT papers (Zhai
      et al. 2022, section 3.5), with the warm-up as its time scale;
    - constant stays at the peak, and so does wsd (warm-up, stable, decay; Hu et al. 2024).

    All but cosine are scaled to 0 over the cooldown before the end: linearly, or (sqrt) by 1 - sqrt
    of the share of the cooldown that is over (Hägele et al. 2024).
    """

    optim: OptimConfig
    """Peak rate and shape."""
    warmup: int
    """Position at which the warm-up ends."""
    cooldown: int
    """Length of the cooldown; 0: none."""
    end: int | None
    """Position at which the run ends; None: not known."""

    def rate(self, before: int, after: int) -> float:
        """Return the learning rate of the optimizer step that leads from `before` to `after`.

        Args:
            before: position when the step begins; 0 for the first step of the run.
            after: position when it ends.
        """
        optim, warmup = self.optim, max(self.warmup, 1)
        if before < self.warmup:
            rate = optim.lr * min(after, warmup) / warmup
        elif optim.schedule == "cosine":
            assert self.end is not None
            share = min((before - self.warmup) / max(self.end - self.warmup, 1), 1.0)
            rate = optim.lr * 0.5 * (1.0 + math.cos(math.pi * share))
        elif optim.schedule == "rsqrt":
            rate = optim.lr * math.sqrt(warmup / after)
        else:
            rate = optim.lr
        if optim.schedule != "cosine" and self.cooldown:
            assert self.end is not None
            left = min(max(self.end - before, 0) / self.cooldown, 1.0)
            rate *= left if optim.cooldown_shape == "linear" else 1.0 - math.sqrt(1.0 - left)
        return rate


def ends_by_epochs(train: TrainConfig) -> bool:
    """Return whether only `train.max_epochs` ends the run: then the plan knows where.

    Beside a limit in another unit than the schedule's it is not known which of them comes first.
    """
    others = (getattr(train, f"max_{unit}") for unit in UNITS)
    return train.max_epochs is not None and all(limit is None for limit in others)


def build_schedule(
    optim: OptimConfig, train: TrainConfig, planned_end: int | None = None
) -> Schedule:
    """Return the schedule of a run.

    Args:
        optim: peak rate, shape and ramps.
        train: the limits of the run.
        planned_end: length of a run that `ends_by_epochs`, in units of `optim.schedule_by`; None:
            not known, so that settings which depend on it are refused.

    Raises:
        ValueError: a field is missing, is in another unit than `optim.schedule_by`, or does not
            fit the length of the run; the message names it.
    """
    if train.max_epochs is None and all(getattr(train, f"max_{unit}") is None for unit in UNITS):
        raise ValueError(
            "the run has no end; set train.max_steps, train.max_images, train.max_tokens or "
            "train.max_epochs"
        )
    unit = optim.schedule_by
    for other in UNITS:
        for ramp in RAMPS:
            if other != unit and getattr(optim, f"{ramp}_{other}"):
                raise ValueError(
                    f"optim.{ramp}_{other} is {getattr(optim, f'{ramp}_{other}')}, but "
                    f"optim.schedule_by is {unit}: set optim.{ramp}_{unit}, or "
                    f"optim.schedule_by={other}"
                )
    end = getattr(train, f"max_{unit}")
    by_epochs = ends_by_epochs(train)
    if by_epochs:
        end = planned_end
    if end is None:
        _refuse_without_end(optim, train)
    warmup, cooldown = (ramp_length(optim, ramp, end) for ramp in RAMPS)
    for schedule, ramp, length in (("rsqrt", "warmup", warmup), ("wsd", "cooldown", cooldown)):
        if optim.schedule == schedule and length == 0:
            raise ValueError(
                f"optim.schedule {schedule} needs optim.{ramp}_{unit} of at least 1, or "
                f"optim.{ramp}_share above 0"
            )
    if all(getattr(optim, f"{ramp}_{unit}") is None for ramp in RAMPS):
        both = optim.warmup_share + optim.cooldown_share
        if both >= 1:
            raise ValueError(
                f"optim.warmup_share + optim.cooldown_share is {both:g}; it must be below 1: lower "
                "them"
            )
    elif end is not None and warmup + cooldown and warmup + cooldown >= end:
        limit = f"train.max_{unit} = {end}"
        if by_epochs:
            limit = f"the {end} {unit} of train.max_epochs = {train.max_epochs}"
        raise ValueError(
            f"optim.warmup_{unit} + optim.cooldown_{unit} is {warmup + cooldown}; it must be below "
            f"{limit}: lower them or train longer"
        )
    return Schedule(optim, warmup, cooldown, end)


def ramp_length(optim: Any, ramp: str, end: int | None) -> int:
    """Return the length of warm-up or cooldown, in units of `optim.schedule_by`.

    Args:
        optim: an `OptimConfig`, or an object with its fields.
        ramp: one of `RAMPS`.
        end: end of the run in these units; None: not known, so that a share gives 0.
    """
    count: int | None = getattr(optim, f"{ramp}_{optim.schedule_by}")
    if count is not None:
        return count
    share: float = getattr(optim, f"{ramp}_share")
    return max(1, round(share * end)) if share and end else 0


def _refuse_without_end(optim: OptimConfig, train: TrainConfig) -> None:
    """Raise ValueError, naming the field, for what depends on the end of a run that has none."""
    unit = optim.schedule_by
    limits = [other for other in UNITS if getattr(train, f"max_{other}") is not None]
    other_unit = f", or optim.schedule_by={limits[0]}" if limits else ""
    if limits and train.max_epochs is not None:
        unset = " ".join(f"train.max_{limit}=null" for limit in limits)
        other_unit += f", or {unset} so that only train.max_epochs ends the run"
    fields = {"optim.schedule = cosine": optim.schedule == "cosine"}
    for ramp in reversed(RAMPS):
        count = getattr(optim, f"{ramp}_{unit}")
        if ramp == "cooldown":
            fields[f"optim.cooldown_{unit}"] = bool(count)
        fields[f"optim.{ramp}_share"] = count is None and bool(getattr(optim, f"{ramp}_share"))
    for field, needed in fields.items():
        if needed:
            ramp = field.removeprefix("optim.").removesuffix("_share")
            instead = f", or optim.{ramp}_{unit}" if field == "optim.warmup_share" else ""
            raise ValueError(
                f"{field} needs the end of the run; set train.max_{unit}{instead}{other_unit}"
            )
