"""Open the labelled images on which the encoder of a run is probed during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_pipeline.plan.arrays import Ints
from data_pipeline.plan.plan import Plan
from data_pipeline.plan.some_images import class_counts, some_images
from data_pipeline.shards.manifest import Manifest
from launch.config.load import ZetaConfig
from launch.run.class_map import SAME_NAMES, class_map
from launch.run.evaluation_plan import held_out_plan, view_of_training
from launch.run.overlap import shared_shards
from launch.run.validation_data import check_unweighted, held_out_of
from zeta.distributed import RankInfo
from zeta.objectives import objective_class
from zeta.probes.classifiers import NEIGHBOURS
from zeta.train.probing.scores import ProbeImages

_SHOWN = 5
"""Number of classes that a message names."""


@dataclass(frozen=True)
class _Part:
    """One part of the probe, before some of its images are chosen."""

    key: str
    """Config key that names its shards."""
    manifest: Manifest
    counts: Ints
    """[K] usable images of each class, as the shards number them."""


@dataclass(frozen=True)
class ProbePlans:
    """The plans of both parts; the same on all ranks."""

    train: Plan
    test: Plan
    classes: Sequence[int]
    """Class index of the training part for each class index of the held-out part."""
    num_classes: int
    classifiers: tuple[str, ...]
    encoder: str
    names: tuple[str, str]
    """Config keys of the two parts."""
    shared: int
    """Number of held-out shards that are shards of the training part too; it should be 0."""

    def of_rank(self, info: RankInfo) -> ProbeImages:
        """Return the images of one rank."""
        return ProbeImages(
            train=held_out_of(self.train, None, info),
            test=held_out_of(self.test, self.classes, info),
            num_classes=self.num_classes,
            classifiers=self.classifiers,
            encoder=self.encoder,
            names=self.names,
        )


def open_probe(config: ZetaConfig, trained_on: Manifest) -> ProbePlans | None:
    """Open and plan the labelled images of the probes; None if no probe is set.

    Args:
        config: config, resolved with the training shards.
        trained_on: the training shards, which are the training part if none is named.

    Raises:
        ValueError: no held-out part is named, or a part cannot be used: no labels, lists of them,
            too few images, or classes that the training part does not have.
    """
    evaluate, data = config.train.evaluate, config.data
    wanted = {"knn": evaluate.knn, "linear_probe": evaluate.probe}
    classifiers = tuple(name for name, is_wanted in wanted.items() if is_wanted)
    if not classifiers:
        return None
    setting = "train.evaluate.knn" if evaluate.knn else "train.evaluate.probe"
    specs = {"data.probe_val_shards": data.probe_val_shards, "data.val_shards": data.val_shards}
    test_key = next((key for key, spec in specs.items() if spec is not None), None)
    if test_key is None:
        raise ValueError(
            f"{setting} is true, but no images are held out for it: set data.probe_val_shards (or "
            f"data.val_shards) to labelled shards, or {setting}=false"
        )
    if data.probe_shards is None:
        train = _part("data.shards", trained_on, setting)
    else:
        train = _part("data.probe_shards", _open("data.probe_shards", data.probe_shards), setting)
    test = _part(test_key, _open(test_key, specs[test_key]), setting)
    classes = _classes(train, test)
    _check_images(train, evaluate.probe_images, knn=evaluate.knn)
    most = evaluate.probe_images
    return ProbePlans(
        train=_plan(config, train, some_images(train.manifest, most, by_class=True)),
        test=_plan(config, test, some_images(test.manifest, most, by_class=False)),
        classes=classes,
        num_classes=len(train.counts),
        classifiers=classifiers,
        encoder=objective_class(config.objective.kind).encoder,
        names=(train.key, test.key),
        shared=len(shared_shards(test.manifest, train.manifest)),
    )


def _open(key: str, spec: Any) -> Manifest:
    check_unweighted(key, spec)
    try:
        return Manifest.open(spec)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _part(key: str, manifest: Manifest, setting: str) -> _Part:
    """Check that images have one class each."""
    counts = class_counts(manifest)
    fix = "give labelled shards as data.probe_shards and data.probe_val_shards"
    if not counts.sum():
        raise ValueError(
            f"{setting} is true, but no image of {key} has a class label: {fix}, or set "
            f"{setting}=false"
        )
    if manifest.label_lists:
        raise ValueError(
            f"{setting} needs one class an image, and {manifest.label_lists:,} images of {key} "
            f"have a list of classes: {fix}, or set {setting}=false"
        )
    return _Part(key, manifest, counts)


def _classes(train: _Part, test: _Part) -> list[int]:
    """Return the class index of the training part for each class index of the held-out part.

    Raises:
        ValueError: the held-out part has classes without an image in the training part.
    """
    names, highest = train.manifest.class_names, len(train.counts) - 1
    known = max(highest, test.manifest.highest_label) + 1 if names is None else len(names)
    whose = f"{train.key}'s"
    try:
        renamed = (
            f"{_remedy(train, test)}; if they are the same classes by other names, {SAME_NAMES}"
        )
        classes = class_map(names, known, test.manifest, whose=whose, remedy=renamed)
    except ValueError as error:
        raise ValueError(f"{test.key}: {error}") from error
    there = np.flatnonzero(test.counts).tolist()
    missing = [c for c in there if classes[c] > highest or not train.counts[classes[c]]]
    if missing:
        labels = test.manifest.class_names
        shown = [str(c) if labels is None else repr(labels[c]) for c in missing[:_SHOWN]]
        more = ", ..." if len(missing) > _SHOWN else ""
        raise ValueError(
            f"{len(missing):,} of the {len(there):,} classes of {test.key} never occur in "
            f"{train.key} ({', '.join(shown)}{more}), so that nothing could be learned of them: "
            f"{_remedy(train, test)}"
        )
    return classes


def _remedy(train: _Part, test: _Part) -> str:
    """Return what to do about classes of which nothing could be learned."""
    return f"add images of them to {train.key}, or leave them out of {test.key}"


def _check_images(train: _Part, most: int, *, knn: bool) -> None:
    """Raise ValueError if the training part has too few images or classes."""
    images, classes = int(train.counts.sum()), int(np.count_nonzero(train.counts))
    if classes < 2:
        raise ValueError(
            f"all {images:,} labelled images of {train.key} have one class, which every image "
            "would be given: give shards of several classes as data.probe_shards"
        )
    if knn and images < NEIGHBOURS:
        raise ValueError(
            f"train.evaluate.knn asks the {NEIGHBOURS} most similar images, and {train.key} has "
            f"only {images:,} with a class: give more as data.probe_shards, or set "
            "train.evaluate.knn=false"
        )
    if most < classes:
        raise ValueError(
            f"train.evaluate.probe_images is {most:,}, below the {classes:,} classes of "
            f"{train.key}, each of which needs an image: set train.evaluate.probe_images to at "
            f"least {classes}"
        )


def _plan(config: ZetaConfig, part: _Part, chosen: Manifest) -> Plan:
    """Return the plan of the chosen images, at the size of `val/` scores."""
    resolution = config.data.resolution
    shown: Mapping[str, Any] = {
        name: getattr(resolution, name) for name in ("max", "fit", "max_upscale")
    }
    data = replace(
        config.data, require_labels=True, max_labels=None, require_captions=False, mix_by="images"
    )
    view = view_of_training(config.model.resolve(), shown)
    try:
        return held_out_plan(
            chosen, data, view, num_lanes=config.train.packs_per_step, name=part.key
        )
    except ValueError as error:
        raise ValueError(f"{part.key}: {error}") from error
