"""Views a second: the loader with one view of each photograph against several, in turn.

    python -m tests.benchmarks.views [--workers 1] [--views 4] [--rounds 7] [--images 400] [--kb 50]

Photographs are those of `tests/data_pipeline/photographs.py`, as JPEGs of at most `--kb` kB; sizes
and dropping are those of the shipped recipe, without and with crops and mirroring. Medians of the
ratios of a round count, so that the noise of a busy machine hits both sides.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from PIL import Image

from data_pipeline.config import AugmentConfig, DataConfig, DropConfig, ResolutionConfig
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.build import build_shards
from tests.benchmarks.loader import rate, zeta_batches
from tests.data_pipeline.photographs import photo_sizes, photograph
from tests.data_pipeline.shard_fixtures import encode

FLOOR = 3.0
_AUGMENTS = {"whole": AugmentConfig(), "cropped": AugmentConfig(flip=True, crop_min_area=0.4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--kb", type=float, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        samples = [
            (f"{n:04d}", {"jpg": jpeg(photograph(*size, n), 1000 * options.kb), "cls": b"0"})
            for n, size in enumerate(photo_sizes(options.images))
        ]
        mean = statistics.mean(len(members["jpg"]) for _, members in samples)
        print(f"{len(samples)} photographs of {mean / 1000:.0f} kB, {options.workers} workers")
        manifest = build_shards(samples, Path(folder), class_names=["photo"])
        for name, augment in _AUGMENTS.items():
            loaders = {
                views: zeta_batches(Plan(manifest, config(views, augment, options.workers), 1))
                for views in (1, options.views)
            }
            ratios = []
            for _ in range(options.rounds):
                rates = {v: rate(loaders[v], images=4 * options.images) for v in loaders}
                ratios.append(rates[options.views] / rates[1])
                print(f"{name}: " + ", ".join(f"{v} views {r:.0f}/s" for v, r in rates.items()))
            for loader in loaders.values():
                loader.close()
            print(f"{name}: ratio {statistics.median(ratios):.2f} (floor {FLOOR})", flush=True)


def jpeg(photo: Image.Image, nbytes: float) -> bytes:
    """Return the JPEG of the highest quality, of 90 or less, that is not above `nbytes`."""
    for quality in range(90, 50, -5):
        data = encode(photo, quality=quality)
        if len(data) <= nbytes:
            break
    return data


def config(views: int, augment: AugmentConfig, workers: int) -> DataConfig:
    return DataConfig(
        token_budget=4096,
        max_images_per_pack=192,
        resolution=ResolutionConfig("side", 64, 256),
        drop=DropConfig("resolution", min=0.1, max=0.9),
        augment=augment,
        views=views,
        patch_size=16,
        cost_dim=768,
        workers=workers,
    )


if __name__ == "__main__":
    main()
