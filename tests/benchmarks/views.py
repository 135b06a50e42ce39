"""Views a second: one view of each photograph against several, in turn.

    python -m tests.benchmarks.views [--workers 1] [--views 4] [--rounds 7] [--images 400] [--kb 50]

Photographs are those of `tests/data_pipeline/photographs.py`, as JPEGs of at most `--kb` kB; sizes
and dropping are those of the shipped recipe, without and with crops and mirroring. Medians of the
ratios of a round count, so that the noise of a busy machine hits both sides: by the time of the
loader, and by the CPU time of an executor, which is steadier.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from data_pipeline.config import AugmentConfig, DataConfig, DropConfig, ResolutionConfig
from data_pipeline.loading.executor import Executor
from data_pipeline.loading.recipe import pack_recipe
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.build import build_shards
from tests.benchmarks.loader import rate, zeta_batches
from tests.data_pipeline.photographs import photo_sizes, photograph
from tests.data_pipeline.shard_fixtures import encode
from zeta.run.cpu_tuning import keep_freed_memory

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
            plans = {
                views: Plan(manifest, config(views, augment, options.workers), num_lanes=1)
                for views in (1, options.views)
            }
            say(f"{name}, loader", of_loader(plans, options.rounds, 4 * options.images))
            say(f"{name}, CPU of an executor", of_executor(plans, options.rounds))


def say(what: str, rounds: list[dict[int, float]]) -> None:
    one, several = rounds[0]
    ratio = statistics.median(rates[several] / rates[one] for rates in rounds)
    rates = (f"{v} views {statistics.median(r[v] for r in rounds):,.0f}/s" for v in rounds[0])
    print(f"{what}: {', '.join(rates)}, ratio {ratio:.2f} (floor {FLOOR})", flush=True)


def of_loader(plans: dict[int, Plan], rounds: int, images: int) -> list[dict[int, float]]:
    """Return the views a second of each number of views, in each round."""
    loaders = {views: zeta_batches(plan) for views, plan in plans.items()}
    rates = [{v: rate(loader, images) for v, loader in loaders.items()} for _ in range(rounds)]
    for loader in loaders.values():
        loader.close()
    return rates


def of_executor(plans: dict[int, Plan], rounds: int) -> list[dict[int, float]]:
    """Return the views a second of CPU time, reading, decoding and packing."""
    keep_freed_memory()
    recipes = {}
    for views, plan in plans.items():
        lane = plan.lane(0)
        recipes[views] = [pack_recipe(plan, lane.next_pack(), 0) for _ in range(4)]
    executor, rates = Executor(None, 60), []
    for _ in range(rounds):
        rates.append({})
        for views, packs in recipes.items():
            start = time.process_time()
            made = sum(executor.execute(pack).batch.num_images for pack in packs)
            rates[-1][views] = made / (time.process_time() - start)
    return rates


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
