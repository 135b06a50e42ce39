"""Evaluate an exported classifier on labelled shards, at one or several resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_pipeline.config import DataConfig, DecodeConfig, DropConfig, ResolutionConfig
from data_pipeline.loader import PackLoader
from data_pipeline.manifest import Manifest
from data_pipeline.plan import Plan
from data_pipeline.sampling import token_grids
from launch.run_setup import data_for_model
from zeta.pretrained import load_pretrained, read_config

NATIVE = "native"
"""The resolution at which every image has its own size."""
_NATIVE_CAP = 1024
_MIN_BUDGET = 4096
_MAX_TOKENS = 1 << 17
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Accuracy:
    """Right answers at one resolution."""

    images: int
    """Images that could be decoded; each is counted once."""
    rejected: int
    top1: float
    top5: float


def evaluate_export(
    export: Path, shards: Any, resolutions: Sequence[str], *, workers: int = 2
) -> dict[str, Any]:
    """Return {`top1`, `top5`, `by_resolution`} of an export on labelled shards.

    Args:
        export: folder written by `zeta export`.
        shards: labelled shards, as for `data.shards`.
        resolutions: `native`, or sides in pixels (a side s stands for the area s * s). The first
            one gives the top-level numbers.
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
    manifest = Manifest.open(shards)
    classes = class_map(config["info"].get("class_names"), config["model"]["num_classes"], manifest)
    model = load_pretrained(export)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    results = {}
    for resolution in resolutions:
        plan = evaluation_plan(manifest, config["model"], resolution, workers)
        results[resolution] = evaluate_plan(model, plan, device, classes)
    first = results[resolutions[0]]
    return {
        "top1": first.top1,
        "top5": first.top5,
        "by_resolution": {name: vars(accuracy) for name, accuracy in results.items()},
    }


def evaluation_plan(
    manifest: Manifest, model_arguments: dict[str, Any], resolution: str, workers: int
) -> Plan:
    """Return a plan that deals every image once, at one resolution, whole and decoded in full.

    Raises:
        ValueError: `resolution` is neither native nor a side in pixels that the model takes.
    """
    data = DataConfig(
        resolution=_resolution(resolution, model_arguments),
        drop=DropConfig(kind="none"),
        decode=DecodeConfig(scaled=False),
        max_images_per_pack=256,
        workers=workers,
    )
    data = data_for_model(data, model_arguments)
    longest = _longest_image(manifest, data) + data.prefix_tokens
    if longest > _MAX_TOKENS:
        raise ValueError(
            f"resolution {resolution!r} makes {longest:,} tokens of the largest image; an "
            f"evaluation takes at most {_MAX_TOKENS:,} an image"
        )
    data = replace(data, token_budget=max(_MIN_BUDGET, longest))
    return Plan(manifest, data, num_lanes=1, max_epochs=1)


@torch.no_grad()
def evaluate_plan(
    model: nn.Module, plan: Plan, device: torch.device, classes: Sequence[int]
) -> Accuracy:
    """Return the accuracy of `model` over every image of a one-epoch plan.

    Args:
        model: in evaluation mode, on `device`.
        plan: of one epoch, in one lane.
        device: where packs go.
        classes: class index of the model for each class index of the shards.

    Raises:
        ValueError: no image could be decoded.
    """
    class_index = torch.tensor(classes, device=device)
    images, rejected, top1, top5 = 0, int(plan.masses.unlabelled.sum()), 0, 0
    for step in PackLoader(plan).steps(None):
        for pack in step.packs:
            batch = pack.to(device)
            logits = model(batch)
            counted = batch.weights > 0
            best = logits[counted].topk(min(5, logits.shape[1]), dim=1).indices
            hits = best == class_index[batch.labels[counted]][:, None]
            images += int(counted.sum())
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.sum())
        rejected += len(step.rejected)
        if not step.more:
            break
    if images == 0:
        raise ValueError(f"none of the {rejected} images could be decoded with a label")
    return Accuracy(images, rejected, top1 / images, top5 / images)


def _resolution(name: str, model_arguments: dict[str, Any]) -> ResolutionConfig:
    if model_arguments["arch"] == "megavit":
        side = model_arguments["image_size"]
        if name not in (NATIVE, str(side)):
            raise ValueError(
                f"resolution {name!r}: this MegaVit takes images of {side} pixels only"
            )
        return ResolutionConfig("fixed", max=side, fit="crop")
    if name == NATIVE:
        return ResolutionConfig("native", max=_NATIVE_CAP)
    if not name.isdecimal() or int(name) < 1:
        raise ValueError(f"resolution {name!r} is neither {NATIVE!r} nor a side in pixels")
    # The side is what was asked for: small images are enlarged to it.
    return ResolutionConfig("fixed", max=int(name), max_upscale=1e9)


def _longest_image(manifest: Manifest, data: DataConfig) -> int:
    """Return the patches of the largest image, so that the budget holds it without shrinking."""
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
                max_tokens=1 << 31,
            )
            longest = max(longest, int((rows * columns).max()))
    return longest


def class_map(trained: Sequence[str] | None, num_classes: int, manifest: Manifest) -> list[int]:
    """Return the model's class index of each class index of the shards.

    Shards that lack some classes, or have them in another order, are understood by their names.

    Args:
        trained: class names of the export, if it has any.
        num_classes: outputs of the model.
        manifest: the labelled shards.

    Raises:
        ValueError: the shards have no labels, or a class that the model does not know.
    """
    if manifest.highest_label < 0:
        raise ValueError("no image in the shards has a class label to compare with")
    names = manifest.class_names
    if trained is not None and names is not None:
        unknown = [name for name in names if name not in trained]
        if unknown:
            raise ValueError(
                f"class {unknown[0]!r} of the shards is none of the export's {len(trained)} "
                f"classes: {', '.join(list(trained)[:10])}{', ...' if len(trained) > 10 else ''}"
            )
        return [list(trained).index(name) for name in names]
    if manifest.highest_label >= num_classes:
        raise ValueError(
            f"the shards hold the class index {manifest.highest_label}, but the model has only "
            f"{num_classes} classes"
        )
    return list(range(num_classes))
