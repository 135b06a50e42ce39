"""Evaluate an export on labelled shards, at several sizes, by groups of images, by frozen features.

Every image counts once, and the scores are put in the order of the shards before they are summed:
ranks, packs and workers change nothing but the speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.loading.loader import PackLoader
from data_pipeline.plan.plan import Plan
from launch.evaluate.features import evaluation_data, labelled_features
from launch.evaluate.groups import scores_by_aspect, scores_by_class, scores_by_side
from launch.evaluate.requests import Prepared, Request, prepare
from launch.evaluate.zero_shot import ZeroShotClassifier
from launch.run.evaluation_plan import (
    Relabelled,
    held_out_plan,
    num_unusable,
)
from zeta.distributed import RankInfo, World
from zeta.exit_codes import RunError
from zeta.models.config import load_pretrained
from zeta.models.packed_vit import PackedViT
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
