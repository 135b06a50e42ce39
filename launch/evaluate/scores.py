"""Evaluate an export on labelled shards, at several sizes, by groups of images, by frozen features.

Every image counts once, and the scores are put in the order of the shards before they are summed:
ranks, packs and workers change nothing but the speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.loading.loader import PackLoader
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.manifest import Manifest
from launch.evaluate.features import evaluation_data, labelled_features
from launch.evaluate.groups import scores_by_aspect, scores_by_class, scores_by_side
from launch.evaluate.small_images import small_images
from launch.evaluate.zero_shot import TEMPLATES, ZeroShotClassifier
from launch.run.evaluation_plan import (
    TRAIN,
    Relabelled,
    View,
    class_map,
    held_out_plan,
    num_unusable,
    view_at,
    view_within,
)
from zeta.distributed import RankInfo, World
from zeta.exit_codes import RunError
from zeta.models.config import load_pretrained
from zeta.models.packed_vit import PackedViT
from zeta.models.sources import read_image_config
from zeta.objectives.classification import SigmoidClassification, SoftmaxClassification
from zeta.objectives.config import ObjectiveConfig
from zeta.packed import PackedBatch
from zeta.probes.classifiers import CLASSIFIERS, NEIGHBOURS, hit_rates
from zeta.probes.image_scores import ImageScores, RowObjective
from zeta.probes.rows import Columns
from zeta.train.evaluation import Evaluation, evaluate

Predict = Callable[[PackedBatch], Tensor]
"""Computes [I, K] logits from a pack on the device."""


@dataclass(frozen=True)
class Accuracy:
    """The scores of a classifier at one size."""

    images: int
    """Number of images that were scored, each once."""
    rejected: int
    """Number of images that could not be used."""
    loss: float
    top1: float
    top5: float


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
            raise ValueError(f"{request.export} was not trained on classes: give --knn or --probe")
        classes = class_map(names, num_classes, manifest, whose="the export's")
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
    for name, spec in (("knn", request.knn), ("linear_probe", request.probe)):
        if spec is None:
            continue
        opened = Manifest.open(list(spec))
        if manifest.label_lists or opened.label_lists:
            raise ValueError(
                "--knn and --probe need one class an image, and these shards have lists of classes"
            )
        names, count = opened.class_names, opened.highest_label + 1
        whose = f"the training shards' ({' '.join(spec)})"
        training[name] = opened, class_map(names, count, manifest, whose=whose)
    return training


def evaluate_export(
    export: Path,
    shards: Any,
    resolutions: Sequence[str],
    *,
    tokens: Sequence[int] = (),
    workers: int = 2,
) -> dict[str, Any]:
    """Evaluate in this process; see `run_evaluation`."""
    request = Request(export, shards, resolutions, tokens, workers=workers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return run_evaluation(prepare(request), World(RankInfo(), device))


def run_evaluation(
    prepared: Prepared, world: World, keep: Callable[[Columns], None] | None = None
) -> dict[str, Any]:
    """Return the scores of an export; every rank calls this, and rank 0 gets all of them.

    Args:
        prepared: the checked request.
        world: the ranks.
        keep: is given the rows of all images at the first size, see `ImageScores`.

    Returns:
        `size`, the first size in words; `top1`, `top5`, `loss` and `images` at it; `sizes`, every
        size in words, by name; `by_resolution`, `by_tokens` (if
        token budgets were given); `per_class`, `by_aspect_ratio` and `by_image_side` at the first
        size; `knn`, `linear_probe` and `zero_shot` if they were done. If the model does not know
        the classes, only these last ones, and `top1` and `top5` are None.

    Raises:
        RunError: no image could be used.
    """
    request = prepared.request
    model = load_pretrained(request.export).to(world.device).eval()
    if prepared.classes is None:
        nothing: dict[str, Any] = {"top1": None, "top5": None, "by_resolution": {}}
        return nothing | _on_features(prepared, model, world)
    data = evaluation_data(prepared.manifest, prepared.arguments, request.workers)
    predict: Predict = model
    if prepared.targets == "caption":
        classifier = ZeroShotClassifier(request.export, prepared.class_names, request.templates)
        predict = classifier.on(model, world.device)
    found: dict[str, dict[str, Any]] = {}
    first_rows: Columns = {}
    for group, views in (("by_resolution", prepared.sides), ("by_tokens", prepared.budgets)):
        found[group] = {}
        for name, view in views.items():
            plan = held_out_plan(prepared.manifest, data, view, num_lanes=world.size)
            scores = ImageScores(
                prepared.objective,
                world,
                independent=prepared.targets == "labels",
                with_names=keep is not None and not first_rows,
            )
            scored, rows = _score(predict, scores, plan, world, prepared.classes)
            found[group][name] = vars(scored)
            first_rows = first_rows or rows
    if keep is not None:
        keep(first_rows)
    first = next(iter([*found["by_resolution"].values(), *found["by_tokens"].values()]))
    result: dict[str, Any] = {"size": prepared.sizes[next(iter(prepared.sizes))]}
    result |= {name: first[name] for name in ("top1", "top5", "loss", "images")}
    result["sizes"] = dict(prepared.sizes)
    result["by_resolution"] = found["by_resolution"]
    if found["by_tokens"]:
        result["by_tokens"] = found["by_tokens"]
    if not prepared.manifest.label_lists:
        result["per_class"] = scores_by_class(first_rows, prepared.class_names)
    result["by_aspect_ratio"] = scores_by_aspect(first_rows, prepared.manifest)
    result["by_image_side"] = scores_by_side(first_rows, prepared.manifest)
    if prepared.targets == "caption":
        result["zero_shot"] = {"templates": list(request.templates)}
    return result | _on_features(prepared, model, world)


def _on_features(prepared: Prepared, model: PackedViT, world: World) -> dict[str, Any]:
    """Return the scores of k-NN and linear probe, as far as they were asked for."""
    if not prepared.training:
        return {}
    workers, view = prepared.request.workers, prepared.first_view
    known: dict[str, tuple[Tensor, Tensor]] = {}
    for manifest in (prepared.manifest, *(manifest for manifest, _ in prepared.training.values())):
        if manifest.fingerprint not in known:
            data = evaluation_data(manifest, prepared.arguments, workers)
            features = labelled_features(model, manifest, data, view, world)
            known[manifest.fingerprint] = features
    if not world.is_main:
        return {}
    test_MD, labels_M = known[prepared.manifest.fingerprint]
    result: dict[str, Any] = {}
    for name, (manifest, classes) in prepared.training.items():
        train_ND, labels_N = known[manifest.fingerprint]
        num_classes = int(labels_N.max()) + 1
        truth_M = torch.tensor(classes)[labels_M]
        num_classes = max(num_classes, int(truth_M.max()) + 1)
        scores = CLASSIFIERS[name](train_ND, labels_N, test_MD, num_classes)
        counts = {"images": len(test_MD), "train_images": len(train_ND)}
        result[name] = hit_rates(scores, truth_M) | counts
        if name == "knn":
            result[name]["k"] = min(NEIGHBOURS, len(train_ND))
    return result


def evaluate_plan(
    model: nn.Module,
    objective: RowObjective,
    plan: Plan,
    device: torch.device,
    classes: Sequence[int],
) -> Accuracy:
    """Return the accuracy of `model` over every image of a one-epoch plan, in this process.

    Args:
        model: in evaluation mode, on `device`.
        objective: a classification.
        plan: plan of one epoch.
        device: device of the model.
        classes: class index of the model for each class index of the shards.

    Raises:
        RunError: no image could be decoded.
    """
    alone = World(RankInfo(), device)
    return _score(model, ImageScores(objective, alone), plan, alone, classes)[0]


def _score(
    predict: Predict, scores: ImageScores, plan: Plan, world: World, classes: Sequence[int]
) -> tuple[Accuracy, Columns]:
    """Return the mean scores over a plan, and those of every image."""
    if plan.num_images == 0:
        raise RunError("the shards hold no image that can be used")
    loader = PackLoader(plan, rank=world.rank, world_size=world.size)
    found = evaluate(predict, scores, Relabelled(loader, classes), world)
    assert isinstance(found, Evaluation), "nothing asks it to stop"
    rejected = found.rejected + num_unusable(plan)
    return Accuracy(found.images, rejected, **found.scores), scores.rows
