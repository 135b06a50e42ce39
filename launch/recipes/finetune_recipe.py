"""Compose the config of a run that fine-tunes an export on labelled images.

Later settings win: the shipped piece train/finetune and the settings that follow from the export,
the images and the mode; then the user's CONFIG and command line; last the model, which is always
that of the export, and the initial weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.masses import Needs, usable_samples
from data_pipeline.shards.weighted import open_shards
from launch.config.load import DEFAULT, Setting, ZetaConfig, config_from, read_settings
from launch.shipped import configs_root
from zeta.models.config import prefix_tokens, takes_one_size
from zeta.models.presets import PRESETS
from zeta.models.sources import open_export as open_weights
from zeta.models.sources import read_image_config

SHIPPED = str(configs_root() / "train" / "finetune.yaml")
"""Recipe that all other settings override."""
EPOCHS = 20
"""Passes over the images, unless the length of the run is set."""
_LEAST_IMAGES = 20_000
"""Least number of images to train on, repeated if there are fewer: some 200 to 300 steps."""
_RATE, _RATE_WIDTH = 3e-4, 768
"""Learning rate, and the channels it is for; it falls with the square root of the channels."""
_PACKS_PER_STEP = 8
_IMAGES_PER_PACK = 8
"""Images of the largest size that a pack holds."""
_UPSCALE = 2.0
_LENGTHS = ("train.max_steps", "train.max_images", "train.max_tokens")
_MAY_DIFFER = ("num_classes", "dropout", "emb_dropout", "stochastic_depth")
"""Options that may differ from the export's; all others decide what its weights mean."""
MODES: dict[str, dict[str, Any]] = {
    "full": {"train.trainable": "all"},
    "probe": {"train.trainable": "head", "optim.layer_decay": 1.0, "optim.lr": 1e-2}
    | {"optim.weight_decay": 0.0, "objective.label_smoothing": 0.0}
    | {"model.dropout": 0.0, "model.emb_dropout": 0.0, "model.stochastic_depth": 0.0},
    "last": {"train.trainable": "last-2", "optim.layer_decay": 0.9},
}
"""Settings of each --mode; `last-K` is `last` with another K."""


@dataclass(frozen=True)
class Export:
    """An export and the content of its config.json."""

    path: Path
    arguments: Mapping[str, Any]
    """Arch and constructor arguments of the model."""
    info: Mapping[str, Any]
    """Facts about the training."""


def open_export(path: Path) -> Export:
    """Read the config.json of an export, and check that its weights can be read.

    Raises:
        ValueError: not an export, one of another format, or its weights are damaged.
    """
    config = read_image_config(path)
    open_weights(path)  # read later, but a damaged one is refused before shards are made
    return Export(path.absolute(), config["model"], config.get("info") or {})


def recipe_settings(mode: str | None) -> list[Setting]:
    """Return the shipped settings, changed by the mode; None means full.

    Raises:
        ValueError: no such mode.
    """
    shipped = read_settings(SHIPPED)
    kind, _, count = (mode or "full").partition("-")
    if kind not in MODES or (count and kind != "last") or (kind == "last" and not count):
        raise ValueError(
            f"--mode is {mode!r}; choose full, probe (a new head on features computed once), or "
            "last-K for the last K blocks, as in last-2"
        )
    changes: dict[str, Any] = MODES[kind] | ({"train.trainable": f"last-{count}"} if count else {})
    return [(DEFAULT, key, value) for _, key, value in shipped if key != "run.name"] + [
        (DEFAULT, key, value) for key, value in changes.items()
    ]


def settings_of_export(export: Export) -> list[Setting]:
    """Return the learning rate, the sizes at which images are shown, and the size of a pack.

    Images are shown at sides from half the largest that the export was trained at up to that one.
    """
    arguments, trained = export.arguments, export.info.get("resolution") or {}
    patch, size = arguments["patch_size"], arguments["image_size"]
    side = int(trained.get("max") or (max(size) if isinstance(size, list) else size))
    if takes_one_size(arguments):
        resolution: dict[str, Any] = {"kind": "fixed", "fit": trained.get("fit", "crop")}
    else:
        resolution = {
            "kind": "side",
            "min": max(patch, side // 2),
            "fit": trained.get("fit", "keep"),
        }
        resolution["max_upscale"] = max(_UPSCALE, trained.get("max_upscale", 1.0))
    tokens = max(1, round(side / patch)) ** 2 + prefix_tokens(arguments)
    settings = {f"data.resolution.{name}": value for name, value in resolution.items()}
    settings |= {"data.resolution.max": side, "data.token_budget": _IMAGES_PER_PACK * tokens}
    settings["data.max_images_per_pack"] = 8 * _IMAGES_PER_PACK
    settings["optim.lr"] = float(f"{_RATE * (_RATE_WIDTH / arguments['dim']) ** 0.5:.2g}")
    settings["train.dtype"] = "bf16" if torch.cuda.is_available() else "fp32"
    return [(DEFAULT, key, value) for key, value in settings.items()]


def settings_of_images(shards: Any, user: Sequence[Setting]) -> list[Setting]:
    """Return packs a step, the loss and the length of the run, all decided by the images.

    Args:
        shards: value of `data.shards`.
        user: settings of CONFIG and the command line.
    """
    manifest, asked = open_shards(shards), {key: value for _, key, value in user}
    usable = usable_images(manifest)
    found: dict[str, Any] = {"train.packs_per_step": max(1, min(_PACKS_PER_STEP, usable))}
    if manifest.label_lists:
        found["objective.kind"] = "sigmoid"
    if not any(asked.get(key) for key in _LENGTHS):
        epochs = asked.get("train.max_epochs") or EPOCHS
        images = round(epochs * usable)
        if "train.max_epochs" not in asked:
            images = max(images, _LEAST_IMAGES)
        found |= {"train.max_images": images, "optim.schedule_by": "images"}
    elif not asked.get("train.max_steps"):  # the schedule follows the limit that is set
        unit = "images" if asked.get("train.max_images") else "tokens"
        found["optim.schedule_by"] = unit
    return [(DEFAULT, key, value) for key, value in found.items()]


def usable_images(manifest: Manifest) -> int:
    """Return the number of images with a class, or classes, that were not bad when indexed."""
    lists = bool(manifest.label_lists)
    needs = Needs(label=not lists, label_list=lists)
    chunk = 1 << 20
    starts = range(0, len(manifest.samples), chunk)
    return sum(int(usable_samples(manifest.samples[s : s + chunk], needs).sum()) for s in starts)


def compose(
    export: Export, base: Sequence[Setting], user: Sequence[Setting], mode: str | None
) -> ZetaConfig:
    """Return the config of the run.

    Args:
        export: the export to fine-tune.
        base: settings that the user may override.
        user: settings of CONFIG and the command line.
        mode: value of --mode.

    Raises:
        ValueError: the user asks for another model, or for two things that contradict each other.
    """
    asked = {key: value for _, key, value in user}
    trainable = asked.get("train.trainable")
    named = {key: value for _, key, value in recipe_settings(mode)}["train.trainable"]
    if mode is not None and trainable not in (None, named):
        raise ValueError(
            f"--mode is {mode}, but train.trainable is {trainable}: leave one of them out"
        )
    if asked.get("train.init_from"):
        raise ValueError(
            f"train.init_from is {asked['train.init_from']}, but the run begins at {export.path}: "
            "leave it out"
        )
    check_same_model_asked(export, asked)
    model = [
        (DEFAULT, f"model.{name}", value)
        for name, value in export.arguments.items()
        if name != "num_classes"
    ]
    known = {key for _, key, _ in model}
    applicable = [(s, key, v) for s, key, v in base if not key.startswith("model.") or key in known]
    begin = (DEFAULT, "train.init_from", str(export.path))
    return config_from([*model, *applicable, *user, begin])


def check_same_model_asked(export: Export, asked: Mapping[str, Any]) -> None:
    """Raise ValueError if the user's `model.*` describes another model than the export's."""
    given = {key.removeprefix("model."): v for key, v in asked.items() if key.startswith("model.")}
    preset = given.pop("preset", None)
    if preset in PRESETS:
        given = dict(PRESETS[preset]) | given
    for name, value in given.items():
        there = export.arguments.get(name)
        if value is not None and name not in _MAY_DIFFER and _plain(value) != _plain(there):
            raise ValueError(
                f"model.{name} is {value!r}, but {export.path} is a model with {name} = {there!r}: "
                "the model comes from the export, so leave model.* out"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
