"""Compute the pooled embeddings of all images of shards, on any number of ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.config import DataConfig
from data_pipeline.loading.loader import PackLoader
from data_pipeline.shards.manifest import Manifest
from launch.config.resolve import data_for_model
from launch.run.evaluation_plan import View, held_out_plan, num_unusable
from zeta.distributed import World
from zeta.exit_codes import RunError
from zeta.models.packed_vit import PackedViT
from zeta.packed import Rejected
from zeta.probes.classifiers import not_finite
from zeta.probes.feature_files import FEATURES_NAME, KEYS_NAME, LABELS_NAME, FeatureFiles
from zeta.train.evaluation import Evaluation, evaluate

BUDGET = 4096
MAX_IMAGES_PER_PACK = 256


@dataclass(frozen=True)
class Extracted:
    """Counts of the images whose features were extracted, and the images that were not."""

    images: int
    unusable: int
    """Number of images that were bad when they were indexed, and so were never read."""
    rejected: tuple[Rejected, ...]
    """Images that could not be decoded."""


def evaluation_data(
    manifest: Manifest, arguments: dict[str, Any], workers: int, *, labels: bool = True
) -> DataConfig:
    """Return the settings with which held-out images are packed for a model.

    Args:
        manifest: the images.
        arguments: arch and constructor arguments of the model.
        workers: decoding processes of each rank.
        labels: whether images without a class are left out.
    """
    data = DataConfig(token_budget=BUDGET, max_images_per_pack=MAX_IMAGES_PER_PACK, workers=workers)
    if manifest.label_lists:
        data = replace(data, max_labels=manifest.most_labels)
    return replace(data_for_model(data, arguments), require_labels=labels)


def extract_features(
    model: PackedViT,
    manifest: Manifest,
    data: DataConfig,
    view: View,
    folder: Path,
    world: World,
    show: Callable[[int], None] = lambda images: None,
) -> Extracted:
    """Write the embeddings of all images into `folder`, see `zeta.probes.feature_files`.

    Every rank calls this, with a folder that all ranks see.

    Raises:
        RunError: no image can be used.
    """
    plan = held_out_plan(manifest, data, view, num_lanes=world.size)
    loader = PackLoader(plan, rank=world.rank, world_size=world.size)
    files = FeatureFiles(folder, world)
    found = evaluate(model.forward_embeddings, files, loader, world, show=show)
    assert isinstance(found, Evaluation), "nothing asks it to stop"
    rejected = [item for rank in world.gather(found.rejected_here) for item in rank]
    rejected.sort(key=lambda item: item.sample_id)
    return Extracted(found.images, num_unusable(plan), tuple(rejected))


@contextmanager
def shared_folder(world: World) -> Iterator[Path]:
    """Yield one temporary folder for all ranks, in rank 0's $TMPDIR.

    Raises:
        ValueError: a rank is on another machine and does not see it.
    """
    holder = tempfile.TemporaryDirectory() if world.is_main else None
    folder = Path(world.broadcast(None if holder is None else holder.name))
    try:
        if not world.all(folder.is_dir()):
            raise ValueError(f"not every rank sees {folder}: set TMPDIR to a folder that all share")
        yield folder
    finally:
        if holder is not None:
            holder.cleanup()


def labelled_features(
    model: PackedViT, manifest: Manifest, data: DataConfig, view: View, world: World
) -> tuple[Tensor, Tensor]:
    """Return the embeddings [n, dim] and classes [n] of all images, on every rank.

    Raises:
        RunError: no image can be used, or an embedding is not finite.
    """
    with shared_folder(world) as folder:
        extract_features(model, manifest, data, view, folder, world)
        features = torch.from_numpy(np.load(folder / FEATURES_NAME))
        labels = torch.from_numpy(np.load(folder / LABELS_NAME))
        keys = (folder / KEYS_NAME).read_text(encoding="utf-8").splitlines()
        world.barrier()  # NOTE: the folder is deleted once all have read it
    if fault := not_finite(features, keys, f"(shards from {manifest.shards[0].path} on)"):
        raise RunError(
            f"{fault}, so nothing can be classified by them: give another model, or another "
            "checkpoint of its run (`zeta export RUN_DIR OUT --step N`)"
        )
    return features, labels
