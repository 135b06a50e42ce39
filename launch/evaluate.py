"""Evaluate an exported classifier on labelled shards, at one or several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipeline.config import DataConfig
from data_pipeline.loader import PackLoader
from data_pipeline.manifest import Manifest
from data_pipeline.plan import Plan
from launch.held_out import (
    Relabelled,
    View,
    class_map,
    held_out_plan,
    num_unusable,
    view_at,
    view_within,
)
from launch.run_setup import data_for_model
from zeta.distributed import RankInfo, World
from zeta.evaluation import Evaluation, evaluate
from zeta.objectives import Objective, build_objective
from zeta.objectives.config import ObjectiveConfig
from zeta.pretrained import load_pretrained, read_config

_BUDGET = 4096
_MAX_IMAGES_PER_PACK = 256


@dataclass(frozen=True)
class Accuracy:
    """What a classifier scored at one size."""

    images: int
    """Images that were scored, each once."""
    rejected: int
    """Images that could not be used."""
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
    """Return {`top1`, `top5`, `by_resolution`} of an export on labelled shards.

    Args:
        export: folder written by `zeta export`.
        shards: labelled shards, as for `data.shards`.
        resolutions: `native`, or sides in pixels (a side s stands for the area s * s).
        tokens: token budgets, as in `train.evaluate.tokens`; they are returned in `by_tokens`.
            The first size of all gives the top-level numbers.
        workers: decoding processes.

    Raises:
        ValueError: not an export, no labels, or classes that the model was not trained on.
    """
    config = read_config(export)
    if "text" in config:
        raise ValueError(
            f"{export} is the export of an image-text model: its outputs are embeddings to compare "
            "with texts, not classes"
        )
    arguments, info = config["model"], config["info"]
    manifest = Manifest.open(shards)
    classes = class_map(
        info.get("class_names"), arguments["num_classes"], manifest, whose="the export's"
    )
    trained = info.get("resolution") or {}
    sides = {name: view_at(name, arguments, trained) for name in resolutions}
    budgets = {str(budget): view_within(budget, arguments, trained) for budget in tokens}
    objective = build_objective(
        ObjectiveConfig(info.get("objective", "softmax")), arguments["num_classes"]
    )
    data = DataConfig(
        token_budget=_BUDGET, max_images_per_pack=_MAX_IMAGES_PER_PACK, workers=workers
    )
    if manifest.label_lists:
        data = replace(data, max_labels=manifest.most_labels)
    data = data_for_model(data, arguments)
    model = load_pretrained(export)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()

    def score(views: dict[str, View]) -> dict[str, dict[str, Any]]:
        plans = {k: held_out_plan(manifest, data, view) for k, view in views.items()}
        return {
            name: vars(evaluate_plan(model, objective, plan, device, classes))
            for name, plan in plans.items()
        }

    by_resolution, by_tokens = score(sides), score(budgets)
    first = next(iter([*by_resolution.values(), *by_tokens.values()]))
    result = {"top1": first["top1"], "top5": first["top5"], "by_resolution": by_resolution}
    return result | ({"by_tokens": by_tokens} if by_tokens else {})


def evaluate_plan(
    model: nn.Module,
    objective: Objective,
    plan: Plan,
    device: torch.device,
    classes: Sequence[int],
) -> Accuracy:
    """Return the accuracy of `model` over every image of a one-epoch plan.

    Args:
        model: in evaluation mode, on `device`.
        objective: a classification.
        plan: of one epoch.
        device: where packs go.
        classes: class index of the model for each class index of the shards.

    Raises:
        ValueError: no image could be decoded.
    """
    source = Relabelled(PackLoader(plan), classes)
    found = evaluate(model, objective, source, World(RankInfo(), device))
    assert isinstance(found, Evaluation), "nobody asks it to stop"
    return Accuracy(found.images, found.rejected + num_unusable(plan), **found.scores)
