"""Plan the evaluation of held-out images: their size and their packs.

`zeta eval` and the evaluation during training call the model differently, and share the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from data_pipeline.config import (
    AugmentConfig,
    DataConfig,
    DecodeConfig,
    DropConfig,
    LocalViewsConfig,
    MixConfig,
    ResolutionConfig,
)
from data_pipeline.plan.plan import Plan
from data_pipeline.plan.sampling import token_grids
from data_pipeline.shards.manifest import Manifest, WeightedSource
from zeta.models.config import takes_one_size
from zeta.packed import PackedBatch, StepPacks, StepSource

NATIVE = "native"
"""The resolution at which every image has its own size."""
TRAIN = "train"
"""The resolution of `val/*` in training: images are at most as large as the largest there."""
_NATIVE_CAP = 1024
_MAX_TOKENS = 1 << 17
_ANY_UPSCALE = 1e9
_CHUNK = 1 << 18


@dataclass(frozen=True)
class View:
    """The size of the images in an evaluation."""

    resolution: ResolutionConfig
    max_patches: int | None = None
    """Largest number of patches of an image; None: the number that `resolution` gives."""

    @property
    def words(self) -> str:
        """The size in words, for people who read a score."""
        side = self.resolution.max
        if self.resolution.kind == "native":
            return f"each image at its own size, up to the area of {side} x {side} pixels"
        if self.resolution.max_upscale > _ANY_UPSCALE / 2 or self.resolution.fit != "keep":
            return f"each image at {side} x {side} pixels, or that area"
        return f"each image at up to the area of {side} x {side} pixels"


def view_at(name: str, model_arguments: Mapping[str, Any], trained: Mapping[str, Any]) -> View:
    """Return the view at a resolution.

    Args:
        name: `train` (see `view_of_training`), `native`, or a side s in pixels: images are resized
            to the area s * s.
        model_arguments: result of `ModelConfig.resolve`.
        trained: `max`, `fit` and `max_upscale` of the images in training, as far as they are known.

    Raises:
        ValueError: the name is neither, or a size that the model does not accept.
    """
    if takes_one_size(model_arguments):
        side = model_arguments["image_size"]
        if name not in (TRAIN, NATIVE, str(side)):
            raise ValueError(
                f"resolution {name!r}: this MegaVit takes images of {side} pixels only"
            )
        return View(_only_size(model_arguments, trained))
    if name == TRAIN:
        return view_of_training(model_arguments, trained)
    fit = trained.get("fit", "keep")
    if name == NATIVE:
        return View(ResolutionConfig("native", max=_NATIVE_CAP, fit=fit))
    if not name.isdecimal() or int(name) < 1:
        raise ValueError(
            f"resolution {name!r} is neither {TRAIN!r} nor {NATIVE!r} nor a side in pixels, as in "
            "224"
        )
    # The user asked for this side, so small images are enlarged to it.
    return View(ResolutionConfig("fixed", max=int(name), fit=fit, max_upscale=_ANY_UPSCALE))


def view_of_training(model_arguments: Mapping[str, Any], trained: Mapping[str, Any]) -> View:
    """Return the view of the scores `val/loss` and `val/top1` of a run.

    Args:
        model_arguments: result of `ModelConfig.resolve`.
        trained: `max`, `fit` and `max_upscale` of the images in training; where the largest side is
            not known it is that of the position tables.
    """
    if takes_one_size(model_arguments):
        return View(_only_size(model_arguments, trained))
    size, patch = model_arguments["image_size"], model_arguments["patch_size"]
    side = int(trained.get("max") or (max(size) if isinstance(size, Sequence) else size))
    return view_within(max(1, side**2 // patch**2), model_arguments, trained)


def view_within(
    tokens: int, model_arguments: Mapping[str, Any], trained: Mapping[str, Any]
) -> View:
    """Return the view within a token budget: larger images are shrunk to fit it.

    Args:
        tokens: largest number of patches of an image.
        model_arguments: result of `ModelConfig.resolve`.
        trained: `fit` of the images in training, and `max_upscale`, the largest factor by which
            smaller images are enlarged.

    Raises:
        ValueError: the model is a MegaVit, whose images have another number of patches.
    """
    patch = model_arguments["patch_size"]
    if takes_one_size(model_arguments):
        only = _only_size(model_arguments, trained)
        if tokens != (only.max // patch) ** 2:
            raise ValueError(
                f"{tokens} tokens: this MegaVit takes images of {(only.max // patch) ** 2} only"
            )
        return View(only)
    side = max(1, math.isqrt(tokens * patch * patch))
    fit, most = trained.get("fit", "keep"), trained.get("max_upscale", 1.0)
    return View(ResolutionConfig("fixed", max=side, fit=fit, max_upscale=most), tokens)


def _only_size(model_arguments: Mapping[str, Any], trained: Mapping[str, Any]) -> ResolutionConfig:
    fit = trained.get("fit", "crop")
    return ResolutionConfig("fixed", max=model_arguments["image_size"], fit=fit)


def held_out_plan(
    manifest: Manifest,
    data: DataConfig,
    view: View,
    *,
    num_lanes: int = 1,
    name: str = "the shards",
) -> Plan:
    """Return a plan with every image once, whole, not augmented and decoded in full.

    Args:
        manifest: the images.
        data: packs and workers, as `data_for_model` returns them; the budget is raised if an image
            does not fit.
        view: size of the images.
        num_lanes: number of lanes, at least the number of ranks.
        name: name of the images in messages.

    Raises:
        ValueError: an image would have more tokens than any memory holds.
    """
    data = replace(
        data,
        resolution=view.resolution,
        drop=DropConfig(kind="none"),
        augment=AugmentConfig(),
        mix=MixConfig(),
        views=1,
        local=LocalViewsConfig(),
        decode=DecodeConfig(scaled=False),
    )
    longest = _longest_image(manifest, data, view) + data.prefix_tokens
    if longest > _MAX_TOKENS:
        raise ValueError(
            f"a side of {view.resolution.max} pixels makes {longest:,} tokens of the largest "
            f"image; an evaluation takes at most {_MAX_TOKENS:,} an image"
        )
    source = WeightedSource(name, 0, len(manifest.shards), 1.0)
    return Plan(
        replace(manifest, sources=(source,)),
        replace(data, token_budget=max(data.token_budget, longest)),
        num_lanes,
        max_epochs=1,
        max_patches=view.max_patches,
        lanes_may_be_empty=True,
    )


def num_unusable(plan: Plan) -> int:
    """Return the number of images that a plan leaves out: without a class, or found bad."""
    return int(plan.masses.unlabelled.sum() + plan.masses.bad.sum())


def _longest_image(manifest: Manifest, data: DataConfig, view: View) -> int:
    """Return the number of patches of the largest image, which the budget must not be below."""
    assert data.patch_size is not None
    longest = 1
    for start in range(0, len(manifest.samples), _CHUNK):
        part = manifest.samples[start : start + _CHUNK]
        heights, widths = part["height"].astype(np.int64), part["width"].astype(np.int64)
        usable = (heights > 0) & (widths > 0)
        if usable.any():
            rows, columns, _ = token_grids(
                data.resolution,
                heights[usable],
                widths[usable],
                np.zeros(int(usable.sum())),
                patch_size=data.patch_size,
                max_tokens=view.max_patches or 1 << 31,
            )
            longest = max(longest, int((rows * columns).max()))
    return longest


class Relabelled:
    """A step source that translates class indices into those of the model.

    Args:
        source: the packs.
        classes: class index of the model for each class index of the shards.
    """

    def __init__(self, source: StepSource, classes: Sequence[int]) -> None:
        self._source, self._classes = source, torch.tensor(classes, dtype=torch.int64)

    def steps(self, state: Mapping[str, Any] | None) -> Iterator[StepPacks]:
        """Yield the steps of the source."""
        for step in self._source.steps(state):
            yield replace(step, packs=tuple(self._translate(pack) for pack in step.packs))

    def state_after(self, step: int) -> Mapping[str, Any]:
        """Return the state of the source."""
        return self._source.state_after(step)

    def _translate(self, pack: PackedBatch) -> PackedBatch:
        sets = None if pack.label_sets is None else self._renumber(pack.label_sets)
        return replace(pack, labels=self._renumber(pack.labels), label_sets=sets)

    def _renumber(self, labels: torch.Tensor) -> torch.Tensor:
        return torch.where(labels >= 0, self._classes[labels.clamp(min=0)], -1)
