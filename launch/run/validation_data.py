"""From a run's config to the held-out images that it is evaluated on while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from data_pipeline.loading.loader import PackLoader
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.manifest import Manifest
from launch.config.load import ZetaConfig
from launch.config.resolve import CLASS_TARGETS, with_targets
from launch.run.evaluation_plan import (
    Relabelled,
    class_map,
    held_out_plan,
    num_unusable,
    view_within,
)
from zeta.distributed import RankInfo
from zeta.objectives import objective_class
from zeta.packed import StepSource
from zeta.train.evaluation import HeldOut

_NAME = "data.val_shards"


@dataclass(frozen=True)
class HeldOutImages:
    """The images of `data.val_shards`, planned at every size to evaluate; the same on all ranks."""

    plans: Sequence[tuple[int | None, Plan]]
    """(token budget of an image, plan); that of the size of training, None, is the first."""
    classes: Sequence[int] | None
    """Class index of the model for each class index of the shards; None: they are not read."""
    fingerprint: str
    trained_on: int
    """Shards of them that are trained on as well: there should be none."""

    def of_rank(self, info: RankInfo) -> list[HeldOut]:
        """Return what one rank evaluates on."""
        return [
            HeldOut(
                tokens=tokens,
                images=plan.num_images,
                unusable=num_unusable(plan),
                fingerprint=self.fingerprint,
                open=partial(self._open, plan, info),
            )
            for tokens, plan in self.plans
        ]

    def _open(self, plan: Plan, info: RankInfo) -> StepSource:
        loader = PackLoader(plan, rank=info.rank, world_size=info.world_size)
        return loader if self.classes is None else Relabelled(loader, self.classes)


def open_held_out(config: ZetaConfig, trained_on: Manifest) -> HeldOutImages | None:
    """Open and plan the images of `data.val_shards`; None where there are none.

    Args:
        config: resolved with the shards that are trained on.
        trained_on: those shards.

    Raises:
        ValueError: the shards cannot be read, hold a class that the model does not know, or a
            token budget is not possible.
    """
    spec, arguments = config.data.val_shards, config.model.resolve()
    if spec is None:
        return None
    if isinstance(spec, list) and any(isinstance(entry, Mapping) for entry in spec):
        raise ValueError(
            f"{_NAME} has weights, but each of its images is scored once: leave the weights out "
            "and list the paths"
        )
    resolution, patch = config.data.resolution, arguments["patch_size"]
    shown = {"fit": resolution.fit, "max_upscale": resolution.max_upscale}
    largest = max(1, resolution.max**2 // patch**2)
    try:
        manifest = Manifest.open(spec)
        data = with_targets(config, manifest).data
        names, num_classes = trained_on.class_names, arguments["num_classes"]
        classes = None
        if objective_class(config.objective.kind).targets in CLASS_TARGETS:
            classes = class_map(names, num_classes, manifest, whose="the model's")
        plans = [
            (
                tokens,
                held_out_plan(
                    manifest,
                    data,
                    view_within(tokens or largest, arguments, shown),
                    num_lanes=config.train.packs_per_step,
                    name=_NAME,
                ),
            )
            for tokens in (None, *config.train.evaluate.tokens)
        ]
    except ValueError as error:
        raise ValueError(f"{_NAME}: {error}") from error
    shared = {shard.path for shard in manifest.shards} & {s.path for s in trained_on.shards}
    return HeldOutImages(plans, classes, manifest.fingerprint, len(shared))
