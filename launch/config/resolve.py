"""Complete a config with the values that the model and the shards take from each other.

Token counts depend on the model's patch size, and the width of the model's head depends on the
classes of the shards.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from data_pipeline.config import DataConfig
from data_pipeline.loading.tokenizer import open_tokenizer
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.manifest import Manifest
from launch.config.load import ZetaConfig
from zeta.models.config import check_arguments, prefix_tokens, takes_one_size
from zeta.objectives import objective_class

CLASS_TARGETS = ("label", "labels")
"""Targets of the objectives whose outputs are the classes of the shards."""
DECIDED_BY = {
    "objective.distill.dim": "objective.distill.teacher",
    "objective.text.vocab_size": "data.text.tokenizer",
}
"""Fields that a file decides, by the field that names it."""


def resolve_with_shards(config: ZetaConfig, manifest: Manifest) -> ZetaConfig:
    """Fill in the values that come from the shards and the model, and check that they agree.

    Raises:
        ValueError: no classes are known; the shards have more classes than the model's head, or
            labels that the objective cannot learn from; the tokenizer of captions cannot be read;
            or the patches in the data config differ from those of the model.
    """
    objective = objective_class(config.objective.kind)
    outputs = objective.head_outputs(config.objective)
    if outputs is None and objective.targets in CLASS_TARGETS:
        outputs = _classes(config, manifest)
    elif outputs is None:
        outputs = config.model.num_classes
    model = replace(config.model, num_classes=outputs)
    arguments = model.resolve()
    check_arguments(arguments)
    if takes_one_size(arguments):
        _check_fixed_size(config.data, arguments["image_size"])
    resolved = replace(config, model=model, data=data_for_model(config.data, arguments))
    return with_targets(resolved, manifest)


def check_named(config: ZetaConfig) -> None:
    """Raise ValueError if a file that training needs besides the shards is not named: a teacher."""
    objective_class(config.objective.kind).check_named(config.objective)


def completed(config: ZetaConfig) -> ZetaConfig:
    """Fill in the values that files besides the shards decide, such as the width of a teacher.

    A plan of the data needs none of them.

    Raises:
        ValueError: a file is missing or cannot serve, by field.
    """
    declared = objective_class(config.objective.kind)
    objective = declared.completed(config.objective, config.data.resolution.fit)
    return replace(config, objective=objective)


def with_targets(config: ZetaConfig, manifest: Manifest) -> ZetaConfig:
    """Set the data config to read the targets that the objective declares.

    Raises:
        ValueError: the objective cannot learn from these shards.
    """
    declared = objective_class(config.objective.kind)
    if (views := config.data.views_of_sample) < declared.least_views:
        raise ValueError(
            f"objective.kind {config.objective.kind} compares views of an image, at least "
            f"{declared.least_views}, and data.views and data.local.views make {views}: set "
            f"data.views={declared.least_views}, or more"
        )
    _check_dropped(config, whole_images=declared.whole_images)
    if config.data.mix.mixes_any and not declared.learns_mixed:
        raise ValueError(
            f"data.mix mixes images and their classes, but objective.kind {config.objective.kind} "
            "does not learn from mixed ones: set data.mix.mixup_alpha=0 and "
            "data.mix.cutmix_alpha=0, or objective.kind=softmax or sigmoid"
        )
    targets = declared.targets
    if targets == "caption":
        return _with_captions(config, manifest)
    if targets in CLASS_TARGETS:
        return _with_labels(config, manifest, several=targets == "labels")
    return replace(config, data=replace(config.data, require_labels=False, max_labels=None))


def _check_dropped(config: ZetaConfig, *, whole_images: bool) -> None:
    """Raise ValueError if dropped patches stay that the objective looks at, or others leave."""
    data = config.data
    local = [data.local.drop] if data.local.views else []
    for drop in (data.drop, *local):
        if drop.kind != "none" and drop.keep and not whole_images:
            raise ValueError(
                f"{drop.place}.keep is true, but objective.kind {config.objective.kind} does not "
                f"look at dropped patches: set {drop.place}.keep=false (an objective of your own "
                "that does declares whole_images = True)"
            )
        if whole_images and drop.kind != "none" and not drop.keep:
            raise ValueError(
                f"objective.kind {config.objective.kind} looks at whole images, but the patches "
                f"that {drop.place}.kind={drop.kind} drops stay in the loader: set "
                f"{drop.place}.keep=true, or {drop.place}.kind=none"
            )


def _with_captions(config: ZetaConfig, manifest: Manifest) -> ZetaConfig:
    """Use captioned samples only, and set the text encoder's vocabulary from the tokenizer."""
    if manifest.old_index is not None:
        raise ValueError(
            f"objective.kind {config.objective.kind} needs captions, and the shards in "
            f"{manifest.old_index} were indexed by a version that did not read all of them: type "
            f"`zeta shards index {manifest.old_index}`"
        )
    if (views := config.data.views_of_sample) > 1:
        raise ValueError(
            f"an image has {views} views, but objective.kind {config.objective.kind} takes every "
            "other image for a wrong partner of a caption, and so would other views of its own "
            "image be: set data.views=1 and data.local.views=0"
        )
    text = config.data.text
    vocabulary = {
        "vocab_size": open_tokenizer(text.tokenizer).vocab_size,
        "max_tokens": text.max_tokens,
    }
    for name, value in vocabulary.items():
        if getattr(config.objective.text, name) not in (None, value):
            raise ValueError(
                f"objective.text.{name} is {getattr(config.objective.text, name)}, but data.text "
                f"makes it {value}: leave it out"
            )
    objective = replace(config.objective, text=replace(config.objective.text, **vocabulary))
    data = replace(config.data, require_labels=False, require_captions=True)
    return replace(config, objective=objective, data=data)


def _with_labels(config: ZetaConfig, manifest: Manifest, *, several: bool) -> ZetaConfig:
    """Use labelled samples only, with lists of labels if the shards have any.

    Args:
        config: config of the run.
        manifest: the shards.
        several: whether the objective can learn from several labels an image.
    """
    labelled = replace(config.data, require_labels=True)
    if manifest.label_lists == 0:
        return replace(config, data=labelled)
    if not several:
        raise ValueError(
            f"objective.kind is {config.objective.kind}, which learns one class an image, but "
            f"{manifest.label_lists} images of the shards have several labels, or an empty list "
            "of them: set objective.kind=sigmoid"
        )
    return replace(config, data=replace(labelled, max_labels=manifest.most_labels))


def _classes(config: ZetaConfig, manifest: Manifest) -> int:
    """Return the number of classes, from the config or the shards."""
    if manifest.highest_label < 0:
        reasons = manifest.reasons()
        rejected = f" (samples that cannot be used: {reasons})" if reasons else ""
        raise ValueError(
            f"no image in the shards has a class{rejected}: put the images into one folder a class "
            "and build the shards again, or give each sample a .cls"
        )
    names = manifest.class_names
    num_classes = config.model.num_classes
    if num_classes is None:
        if names is None:
            raise ValueError(
                "the shards have no class map (classes.json), so model.num_classes must be set"
            )
        num_classes = len(names)
    elif names is not None and len(names) > num_classes:
        raise ValueError(
            f"model.num_classes is {num_classes}, but the class map of the shards has {len(names)}"
        )
    if manifest.highest_label >= num_classes:
        raise ValueError(
            f"model.num_classes is {num_classes}, but the shards hold the class index "
            f"{manifest.highest_label}: set model.num_classes to at least "
            f"{manifest.highest_label + 1}, or correct the labels"
        )
    return num_classes


def data_for_model(data: DataConfig, model_arguments: dict[str, Any]) -> DataConfig:
    """Return the data config with the model's patch size, prefix tokens and cost filled in.

    Raises:
        ValueError: the config sets one of them to another value.
    """
    decided = {
        "patch_size": model_arguments["patch_size"],
        "prefix_tokens": prefix_tokens(model_arguments),
        "cost_dim": model_arguments["dim"],
    }
    unset = DataConfig()
    for name, value in decided.items():
        if getattr(data, name) not in (value, getattr(unset, name)):
            what = getattr(data, name)
            raise ValueError(f"data.{name} is {what}, but the model makes it {value}: leave it out")
    return replace(data, **decided)


def training_plan(config: ZetaConfig, manifest: Manifest) -> Plan:
    """Return the plan of a run from its resolved config."""
    return Plan(
        manifest, config.data, config.train.packs_per_step, max_epochs=config.train.max_epochs
    )


def _check_fixed_size(data: DataConfig, image_size: Any) -> None:
    """Raise ValueError unless every image gets the one square size that a MegaVit accepts."""
    resolution = data.resolution
    if resolution.kind != "fixed" or resolution.fit == "keep" or resolution.max != image_size:
        raise ValueError(
            "model.arch is megavit, which takes images of one size: set "
            f"data.resolution.kind=fixed, data.resolution.max={image_size} and "
            f"data.resolution.fit=crop (or squash); now they are {resolution.kind}, "
            f"{resolution.max} and {resolution.fit}"
        )
    local = data.local.resolution
    if data.local.views and (local.kind, local.max) != ("fixed", image_size):
        raise ValueError(
            "model.arch is megavit, which takes images of one size: set "
            f"data.local.resolution.kind=fixed and data.local.resolution.max={image_size}, or "
            f"data.local.views=0; now they are {local.kind} and {local.max}"
        )
