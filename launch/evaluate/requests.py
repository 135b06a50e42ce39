"""Check what `zeta eval` is asked for, before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.shards.manifest import Manifest
from launch.evaluate.small_images import small_images
from launch.evaluate.zero_shot import TEMPLATES
from launch.run.class_map import SAME_NAMES, class_map
from launch.run.evaluation_plan import (
    TRAIN,
    View,
    view_at,
    view_within,
)
from zeta.models.sources import read_image_config
from zeta.objectives.classification import SigmoidClassification, SoftmaxClassification
from zeta.objectives.config import ObjectiveConfig
from zeta.probes.image_scores import RowObjective

_OPTIONS = {"knn": "--knn", "linear_probe": "--probe"}
"""Options that give the images to learn from."""


@dataclass(frozen=True)
class Request:
    """An evaluation as the user asks for it."""

    export: Path
    shards: Any
    """Labelled shards, as for `data.shards`."""
    resolutions: Sequence[str] = (TRAIN,)
    """`train` (as `val/*` in training), `native`, or sides in pixels (a side s stands for the area
    s * s)."""
    tokens: Sequence[int] = ()
    """Token budgets, as in `train.evaluate.tokens`. Scores that name no size are those of the first
    size of all."""
    knn: Sequence[str] | None = None
    """Shards whose features are the neighbours; without them there is no k-NN."""
    probe: Sequence[str] | None = None
    """Shards on whose features a linear classifier is fitted; without them none is."""
    templates: Sequence[str] = TEMPLATES
    """Prompts for the class names, used with an image-text model."""
    workers: int = 2
    """Decoding processes of each rank."""


@dataclass(frozen=True)
class Prepared:
    """A request that was checked and can be carried out; made without loading the model."""

    request: Request
    manifest: Manifest
    arguments: dict[str, Any]
    """Arch and constructor arguments of the model."""
    classes: Sequence[int] | None
    """Class index of the model for each class index of the shards. None: the model does not know
    the classes, and only its features are evaluated."""
    class_names: Sequence[str]
    objective: RowObjective
    targets: str
    """Targets that the model was trained on, see `zeta.objectives.base.TARGETS`."""
    sides: Mapping[str, View]
    budgets: Mapping[str, View]
    training: Mapping[str, tuple[Manifest, Sequence[int]]] = field(default_factory=dict)
    """Images that k-NN and probe learn from, and their class index for each of the shards."""
    warning: str | None = None

    @property
    def first_view(self) -> View:
        """The size of the scores that name no size."""
        return next(iter([*self.sides.values(), *self.budgets.values()]))

    @property
    def sizes(self) -> Mapping[str, str]:
        """The sizes that are scored, in words, by their names."""
        within = {f"{name} tokens": view for name, view in self.budgets.items()}
        return {name: view.words for name, view in {**self.sides, **within}.items()}


def prepare(request: Request) -> Prepared:
    """Check a request.

    Raises:
        ValueError: not an export, no labels, classes that the model was not trained on, or a size
            that it cannot process.
    """
    config = read_image_config(request.export)
    arguments, info = config["model"], config["info"]
    manifest = Manifest.open(request.shards)
    names, num_classes = info.get("class_names"), arguments["num_classes"]
    targets = trained_targets(config)
    if targets == "caption":
        names = manifest.class_names
        num_classes = len(names or ())
    trained = info.get("resolution") or {}
    warning = small_images(manifest, arguments["patch_size"])  # raises if all of them are
    kind = SigmoidClassification if targets == "labels" else SoftmaxClassification
    training = _training(request, manifest)
    classes: Sequence[int] | None
    try:
        if targets == "caption" and names is None:
            raise ValueError(
                f"{request.export} is an image-text model: it tells images apart by the names of "
                "classes, and the shards have none; put a classes.json (a list of names) beside "
                "them and index them again"
            )
        if targets == "none":
            remedy = "" if training else ": give --knn or --probe"
            raise ValueError(f"{request.export} was not trained on classes{remedy}")
        classes = class_map(
            names,
            num_classes,
            manifest,
            whose="the export's",
            remedy="" if training else "its features alone are scored with --knn or --probe",
        )
    except ValueError as error:
        if not training:
            raise
        classes, warning = None, f"only features are evaluated: {error}"
    return Prepared(
        request,
        manifest,
        arguments,
        classes,
        names or [str(index) for index in range(num_classes)],
        kind(ObjectiveConfig(), num_classes),
        targets,
        {name: view_at(name, arguments, trained) for name in request.resolutions},
        {str(budget): view_within(budget, arguments, trained) for budget in request.tokens},
        training,
        warning,
    )


def check_rows(prepared: Prepared, *, confusion: bool) -> None:
    """Check that every image has a predicted class, and for a confusion matrix one true class.

    Raises:
        ValueError: the model does not know the classes, or images have lists of them.
    """
    if prepared.classes is None:
        raise ValueError(
            "--per-image and --confusion need a model that knows the classes of the images; "
            f"here {prepared.warning}"
        )
    if confusion and prepared.manifest.label_lists:
        raise ValueError("--confusion needs one class an image, and these have lists of classes")


def trained_targets(config: Mapping[str, Any]) -> str:
    """Return the targets that an export can be scored on, from its config.json.

    See `zeta.objectives.base.TARGETS`. An export without a text encoder cannot use captions.
    """
    info = config["info"]
    by_objective = "labels" if info.get("objective") == "sigmoid" else "label"  # older exports
    if "text" in config:
        return "caption"
    targets = str(info.get("targets", by_objective))
    return "none" if targets == "caption" else targets


def _training(request: Request, manifest: Manifest) -> dict[str, tuple[Manifest, Sequence[int]]]:
    """Open the images that k-NN and probe learn from; the model need not know their classes."""
    training: dict[str, tuple[Manifest, Sequence[int]]] = {}
    for name, spec in zip(_OPTIONS, (request.knn, request.probe), strict=True):
        if spec is None:
            continue
        opened, option = Manifest.open(list(spec)), _OPTIONS[name]
        if opened.highest_label < 0:
            raise ValueError(
                f"no image of {' '.join(spec)} has a class label to learn from: give labelled "
                f"shards to {option}"
            )
        if manifest.label_lists or opened.label_lists:
            raise ValueError(
                "--knn and --probe need one class an image, and these shards have lists of classes"
            )
        names, count = opened.class_names, opened.highest_label + 1
        whose = f"the training shards' ({' '.join(spec)})"
        training[name] = (
            opened,
            class_map(
                names,
                count,
                manifest,
                whose=whose,
                shards=_words(request.shards),
                remedy=f"give {option} shards that hold every class of these; if they are the same "
                f"classes by other names, {SAME_NAMES}",
            ),
        )
    return training


def _words(spec: Any) -> str:
    """Return shards as they were given, in words."""
    return spec if isinstance(spec, str) else " ".join(map(str, spec))
