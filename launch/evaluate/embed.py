"""`zeta embed`: write the features of images as arrays, with their keys."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data_pipeline.shards.manifest import Manifest
from launch.evaluate.features import evaluation_data, extract_features
from launch.evaluate.small_images import small_images
from launch.filesystems import check_place
from launch.run.evaluation_plan import TRAIN, View, held_out_plan, view_at, view_within
from zeta.distributed import World
from zeta.exit_codes import RunError
from zeta.models.config import load_pretrained
from zeta.models.sources import read_image_config
from zeta.probes.classifiers import not_finite
from zeta.probes.feature_files import FEATURES_NAME, KEYS_NAME

REJECTED_NAME = "rejected.jsonl"


def check_out(export: Path, out: Path) -> dict[str, Any]:
    """Return config.json of the export, once it is one and `out` can be written.

    Raises:
        ValueError: not an export, or `out` is not empty.
    """
    config = read_image_config(export)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists: name a new folder for the features")
    check_place(out, "OUT")
    return config


def check_embed(
    export: Path, shards: Sequence[str], out: Path, resolution: str, tokens: int | None
) -> tuple[Manifest, dict[str, Any], View]:
    """Check the export, the shards, the size and the folder, before a model is loaded.

    Returns:
        The images, config.json of the export, and the size of the images.

    Raises:
        ValueError: not an export, no shards, an invalid size, or `out` is not empty.
    """
    config = check_out(export, out)
    manifest = Manifest.open(list(shards))
    trained = config["info"].get("resolution") or {}
    if tokens is None:
        view = view_at(resolution, config["model"], trained)
    else:
        view = view_within(tokens, config["model"], trained)
    data = evaluation_data(manifest, config["model"], 0, labels=False)
    held_out_plan(manifest, data, view)  # raises for a size beyond any memory
    small_images(manifest, config["model"]["patch_size"])  # raises if all of them are
    return manifest, config, view


def embed_shards(
    export: Path,
    shards: Sequence[str],
    out: Path,
    world: World,
    *,
    resolution: str = TRAIN,
    tokens: int | None = None,
    workers: int = 2,
) -> dict[str, Any]:
    """Write the pooled embeddings of all images of `shards` to the new folder `out`.

    `out` holds `features.npy` [n, dim] float32, `keys.txt` and `labels.npy` [n] (-1: none) in order
    of the shards, `rejected.jsonl` with the images that are not in them and why, and `meta.json`.
    It is whole or absent. Every rank calls this; `out` lies on a disk that all of them see.

    Args:
        export: folder written by `zeta export`.
        shards: as for `data.shards`.
        out: new folder.
        world: the ranks.
        resolution: train, native, or a side s in pixels, see `launch.run.evaluation_plan.view_at`.
        tokens: largest number of patches of an image, in place of `resolution`.
        workers: decoding processes of each rank.

    Returns:
        The content of meta.json.

    Raises:
        ValueError: as `check_embed`.
        RunError: no image can be used.
    """
    manifest, config, view = check_embed(export, shards, out, resolution, tokens)
    model = load_pretrained(export).to(world.device).eval()
    data = evaluation_data(manifest, config["model"], workers, labels=False)
    warning = small_images(manifest, config["model"]["patch_size"])
    if warning is not None and world.is_main:
        print(warning, file=sys.stderr)
    with _whole_folder(out, world) as partial:
        with tqdm(total=len(manifest.samples), unit=" images", disable=not world.is_main) as bar:

            def show(done: int) -> None:
                bar.update(done - bar.n)

            found = extract_features(model, manifest, data, view, partial, world, show)
        facts = {
            "images": found.images,
            "dim": config["model"]["dim"],
            "rejected": found.unusable + len(found.rejected),
            "export": str(export),
            "step": config["info"].get("step"),
            "size": f"{tokens} tokens" if tokens is not None else resolution,
            "fingerprint": manifest.fingerprint,
        }
        if world.is_main:
            _write_rejected(partial / REJECTED_NAME, manifest, found.rejected)
            _warn_of_not_finite(partial)
            (partial / "meta.json").write_text(json.dumps(facts) + "\n")
    return facts


@contextmanager
def _whole_folder(out: Path, world: World) -> Iterator[Path]:
    """Yield a folder for all ranks to write to that takes the name `out` if the block succeeds."""
    partial = out.absolute().with_name(f".tmp-{out.name}")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)  # NFS keeps files that a process has open
    world.barrier()  # NOTE: the folder is there
    try:
        yield partial
        if world.is_main:
            if out.exists():
                out.rmdir()
            partial.rename(out)
    except (RunError, OSError, ValueError, KeyboardInterrupt):
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    world.barrier()  # NOTE: the result is there when any rank ends


def _warn_of_not_finite(folder: Path) -> None:
    keys = (folder / KEYS_NAME).read_text(encoding="utf-8").splitlines()
    features = torch.from_numpy(np.load(folder / FEATURES_NAME))
    if fault := not_finite(features, keys, "written"):
        print(f"WARNING: {fault}: give another model or checkpoint", file=sys.stderr)


def _write_rejected(path: Path, manifest: Manifest, rejected: Sequence[Any]) -> None:
    """List the images that could not be used, by shard and key."""
    lines = [
        {"key": item.key, "shard": item.shard, "reason": item.reason}
        for item in (*manifest.rejections(), *rejected)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
