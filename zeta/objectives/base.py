"""The declaration of an objective: everything that a run needs to know before it builds a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from zeta.models.config import ModelConfig, build_model
from zeta.objectives.config import ObjectiveConfig
from zeta.objectives.frozen import FrozenModule

TARGETS = ("none", "label", "labels", "caption")
"""Kinds of training targets: none (the image alone), one class, any number of classes, or a
caption."""


@dataclass(frozen=True)
class Step:
    """An optimizer step, as the run stands before it.

    All of it is a function of what was trained before: the same on every rank, on any number of
    ranks, and after a resume.
    """

    index: int
    """Steps before it, those that changed nothing included: 0 for the first."""
    seed: int
    """Seed of its random draws."""
    share: float | None
    """Share of the run that is done before it, in [0, 1], by the nearest of its limits
    (`train.max_steps`, `max_images`, `max_tokens`, `max_epochs`). None: not known, as only
    `max_epochs` ends the run, and `zeta.train.trainer.Trainer` was not told the images of one."""


class DeclaredObjective:
    """Base of all objectives, built with the config and the number of outputs of the head.

    The defaults are those of an objective that learns from images alone, on the encoder itself.
    """

    targets: ClassVar[str] = "none"
    """One of `TARGETS`; samples without it are not used."""
    headline: ClassVar[str | None] = None
    """The metric of its tally that ranks steps; higher is better. None: steps are not ranked."""
    encoder: ClassVar[str] = ""
    """Prefix of the encoder's parameters in the model: `zeta export` writes the encoder alone.
    Empty: the model is the encoder."""

    learns_mixed: ClassVar[bool] = False
    """Whether it learns from images that are mixed of two (`data.mix`), by `mixed_with` and
    `own_shares` of a pack."""
    least_views: ClassVar[int] = 1
    """Fewest views of an image, global and local ones, that it can learn from."""
    whole_images: ClassVar[bool] = False
    """Whether it looks at dropped patches too: `data.drop.keep` is required where any are."""

    def __init__(self, config: ObjectiveConfig, num_outputs: int) -> None:
        self.num_outputs = num_outputs

    def place(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Put what it holds besides the model (a frozen teacher) where training runs.

        Called once, before the first step. Nothing of it is optimized, sharded or saved.

        Args:
            device: of the model.
            dtype: in which matrices are multiplied; None: fp32.
        """

    def facts(self) -> dict[str, str]:
        """Return what a checkpoint names, and a resume must find unchanged, by config field."""
        return {}

    def start(self, model: nn.Module) -> None:
        """Set weights that depend on others, as those of a teacher that begins as its student.

        Called once in a run, after the initial values and `train.init_from`, before the weights
        are given to the optimizer. A resume has all weights from its checkpoint.

        Args:
            model: to train; whole, or each rank with its shards alone (ZeRO-3).
        """

    def begin_step(self, step: Step) -> None:
        """Prepare for an optimizer step."""

    def finish_step(self, model: nn.Module, step: Step) -> None:
        """Follow a step that changed the weights of `model`, which may be sharded."""

    @classmethod
    def check_config(cls, config: ObjectiveConfig) -> None:
        """Raise ValueError, naming the field, for an option that the objective does not have."""

    @classmethod
    def check_named(cls, config: ObjectiveConfig) -> None:
        """Raise ValueError, naming the field, if a file that training needs is not named at all.

        No file is read. A plan of the data needs none of them, so this is no part of
        `check_config`.
        """

    @classmethod
    def completed(cls, config: ObjectiveConfig, fit: str) -> ObjectiveConfig:
        """Return the config with the values that files decide, such as the width of a teacher.

        Args:
            config: config of the run.
            fit: how images get their shape, `data.resolution.fit`.

        Raises:
            ValueError: a file is missing or cannot serve, by field.
        """
        return config

    @classmethod
    def outline_beside(cls, config: ObjectiveConfig) -> FrozenModule | None:
        """Return what runs beside the model on every pack, on the meta device; None: nothing.

        Its memory is predicted from this: of its parameters, and of a forward pass on a pack.

        Raises:
            ValueError: a file is missing or cannot serve, by field.
        """
        return None

    @classmethod
    def head_outputs(cls, config: ObjectiveConfig) -> int | None:
        """Return the number of outputs of the encoder's head; None: `model.num_classes`."""
        return None

    @classmethod
    def build_model(cls, model: ModelConfig, config: ObjectiveConfig, seed: int) -> nn.Module:
        """Build the model to train, with weights that are a function of `seed`."""
        return build_model(model, seed)

    @classmethod
    def text_arguments(cls, config: ObjectiveConfig) -> dict[str, Any] | None:
        """Return the arguments of the `TextTower` to export with the encoder, None without one."""
        return None


def refuse_label_smoothing(config: ObjectiveConfig) -> None:
    """Raise ValueError for label smoothing, for an objective without labels."""
    if config.label_smoothing:
        raise ValueError(
            f"objective.label_smoothing is {config.label_smoothing:g}, but objective.kind "
            f"{config.kind} has no labels: leave it out"
        )
