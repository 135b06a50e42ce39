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
    manifest = Manifest.open(shards)
    _check_classes(config["info"].get("class_names"), manifest)
    model = load_pretrained(export)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    results = {}
    for resolution in resolutions:
        plan = evaluation_plan(manifest, config["model"], resolution, workers)
        results[resolution] = evaluate_plan(model, plan, device)
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
    data = replace(data, token_budget=max(_MIN_BUDGET, longest))
    return Plan(manifest, data, num_lanes=1, max_epochs=1)


@torch.no_grad()
def evaluate_plan(model: nn.Module, plan: Plan, device: torch.device) -> Accuracy:
    """Return the accuracy of `model` over every image of a one-epoch plan."""
    images, rejected, top1, top5 = 0, int(plan.masses.unlabelled.sum()), 0, 0
    for step in PackLoader(plan).steps(None):
        for pack in step.packs:
            batch = pack.to(device)
            logits = model(batch)
            counted = batch.weights > 0
            best = logits[counted].topk(min(5, logits.shape[1]), dim=1).indices
            hits = best == batch.labels[counted, None]
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


def _check_classes(trained: Sequence[str] | None, manifest: Manifest) -> None:
    names = manifest.class_names
    if trained is not None and names is not None and list(trained) != list(names):
        what = _first_difference(trained, names)
        raise ValueError(f"the classes of the shards are not those of the export: {what}")


def _first_difference(trained: Sequence[str], names: Sequence[str]) -> str:
    for index, (ours, theirs) in enumerate(zip(trained, names, strict=False)):
        if ours != theirs:
            return f"class {index} is {theirs!r} in the shards and {ours!r} in the export"
    return f"{len(names)} classes in the shards, {len(trained)} in the export"
