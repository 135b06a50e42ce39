"""Open the held-out images on which a run is evaluated during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from data_pipeline.loading.loader import PackLoader
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.manifest import Manifest
from launch.config.load import ZetaConfig
from launch.config.resolve import CLASS_TARGETS, with_targets
from launch.run.class_map import SAME_NAMES, class_map
from launch.run.evaluation_plan import (
    Relabelled,
    held_out_plan,
    num_unusable,
    view_of_training,
    view_within,
)
from launch.run.overlap import shared_shards
from zeta.distributed import RankInfo
from zeta.objectives import objective_class
from zeta.packed import StepSource
from zeta.train.evaluation import HeldOut

_NAME = "data.val_shards"
UNKNOWN_CLASSES = (
    f"add images of them to data.shards, or leave them out of {_NAME}; if they are the same "
    f"classes by other names, {SAME_NAMES}"
)
"""What to do about held-out classes that the model does not know, for messages."""


@dataclass(frozen=True)
class HeldOutImages:
    """The images of `data.val_shards`, planned at every evaluated size; the same on all ranks."""

    plans: Sequence[tuple[int | None, Plan]]
    """Pairs of (token budget of an image, plan); first None, the image size of training."""
    classes: Sequence[int] | None
    """Class index of the model for each class index of the shards; None: classes are not used."""
    trained_on: int
    """Number of these shards that are also trained on; it should be 0."""

    def of_rank(self, info: RankInfo) -> list[HeldOut]:
        """Return the held-out images of one rank, at every evaluated size."""
        return [held_out_of(plan, self.classes, info, tokens=tokens) for tokens, plan in self.plans]


def held_out_of(
    plan: Plan, classes: Sequence[int] | None, info: RankInfo, *, tokens: int | None = None
) -> HeldOut:
    """Return the images of a plan for one rank.

    Args:
        plan: result of `held_out_plan`.
        classes: class index that each class index of the shards becomes; None: they stay.
        info: the rank.
        tokens: token budget of an image, in the names of the scores.
    """
    return HeldOut(
        tokens=tokens,
        images=plan.num_images,
        unusable=num_unusable(plan),
        fingerprint=plan.manifest.fingerprint,
        open=partial(_open, plan, classes, info),
    )


def _open(plan: Plan, classes: Sequence[int] | None, info: RankInfo) -> StepSource:
    loader = PackLoader(plan, rank=info.rank, world_size=info.world_size)
    return loader if classes is None else Relabelled(loader, classes)


def check_unweighted(name: str, spec: Any) -> None:
    """Raise ValueError, naming the config key, if held-out shards are given with weights."""
    if isinstance(spec, list) and any(isinstance(entry, Mapping) for entry in spec):
        raise ValueError(
            f"{name} has weights, but each of its images is scored once: leave the weights out "
            "and list the paths"
        )


def open_held_out(config: ZetaConfig, trained_on: Manifest) -> HeldOutImages | None:
    """Open and plan the images of `data.val_shards`; None if that is not set.

    Args:
        config: config, resolved with the training shards.
        trained_on: the training shards.

    Raises:
        ValueError: the shards cannot be read or contain a class that the model does not know, or a
            token budget is not possible.
    """
    spec, arguments = config.data.val_shards, config.model.resolve()
    if spec is None:
        return None
    check_unweighted(_NAME, spec)
    resolution = config.data.resolution
    shown = {name: getattr(resolution, name) for name in ("max", "fit", "max_upscale")}
    try:
        manifest = Manifest.open(spec)
        data = with_targets(config, manifest).data
        names, num_classes = trained_on.class_names, arguments["num_classes"]
        classes = None
        if objective_class(config.objective.kind).targets in CLASS_TARGETS:
            classes = class_map(
                names, num_classes, manifest, whose="the model's", remedy=UNKNOWN_CLASSES
            )
        plans = [
            (
                tokens,
                held_out_plan(
                    manifest,
                    data,
                    view_of_training(arguments, shown)
                    if tokens is None
                    else view_within(tokens, arguments, shown),
                    num_lanes=config.train.packs_per_step,
                    name=_NAME,
                ),
            )
            for tokens in (None, *config.train.evaluate.tokens)
        ]
    except ValueError as error:
        raise ValueError(f"{_NAME}: {error}") from error
    shared = len(shared_shards(manifest, trained_on))
    return HeldOutImages(plans, classes, shared)
