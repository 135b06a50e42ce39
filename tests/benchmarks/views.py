"""Views a second: one view of each photograph against several, in turn.

    python -m tests.benchmarks.views [--workers 1] [--views 4] [--rounds 7] [--images 400] [--kb 50]
    python -m tests.benchmarks.views --full-size --images 40

Photographs are those of `tests/data_pipeline/photographs.py`, as JPEGs of at most `--kb` kB, or, as
cameras write them, of 2,000 pixels at quality 90 (`tests/benchmarks/full_size.py`); sizes and
dropping are those of the shipped recipe, without and with crops and mirroring, and last the two
global and six local views of navit_b16_lejepa against one global view. Medians of the ratios of a
round count, so that the noise of a busy machine hits both sides: by the time of the loader, and by
the CPU time of an executor, which is steadier. With them: the share of decoding, which is what
further views save, and the time beyond decoding that a view may take for `FLOOR`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from data_pipeline.config import AugmentConfig, DataConfig, DropConfig, ResolutionConfig
from data_pipeline.loading.decode import decode
from data_pipeline.loading.executor import Executor
from data_pipeline.loading.fetch import read_image
from data_pipeline.loading.recipe import pack_recipe
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.build import build_shards
from launch.config.load import load_config
from tests.benchmarks.full_size import full_size_photographs
from tests.benchmarks.loader import rate, zeta_batches
from tests.data_pipeline.photographs import photo_sizes, photograph
from tests.data_pipeline.shard_fixtures import encode
from zeta.run.cpu_tuning import keep_freed_memory

FLOOR = 3.0
LEAST_TIMED = 1600
"""Fewest views a round: half as many first use up the packs that wait in the queue."""
_AUGMENTS = {"whole": AugmentConfig(), "cropped": AugmentConfig(flip=True, crop_min_area=0.4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--kb", type=float, default=50)
    parser.add_argument("--full-size", action="store_true", help="2,000 pixels; --kb has no effect")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.full_size:
            photos = (encode(image, quality=90) for image in full_size_photographs(options.images))
        else:
            sizes = enumerate(photo_sizes(options.images))
            photos = (jpeg(photograph(*size, n), 1000 * options.kb) for n, size in sizes)
        samples = [(f"{n:04d}", {"jpg": photo, "cls": b"0"}) for n, photo in enumerate(photos)]
        mean = statistics.mean(len(members["jpg"]) for _, members in samples)
        print(f"{len(samples)} photographs of {mean / 1000:.0f} kB, {options.workers} workers")
        manifest = build_shards(samples, Path(folder), class_names=["photo"])
        for name, augment in _AUGMENTS.items():
            plans = {
                views: Plan(manifest, config(views, augment, options.workers), num_lanes=1)
                for views in (1, options.views)
            }
            images = max(4 * options.images, LEAST_TIMED)
            say(f"{name}, loader", of_loader(plans, options.rounds, images))
            say_executor(name, plans, options.rounds)
        recipe = load_config("navit_b16_lejepa", ["data.workers=0", "data.shards=-"]).data
        recipe = replace(recipe, patch_size=16, cost_dim=768)
        one = replace(recipe, views=1, local=replace(recipe.local, views=0))
        both = {1: Plan(manifest, one, 1), recipe.views_of_sample: Plan(manifest, recipe, 1)}
        say_executor("navit_b16_lejepa", both, options.rounds)


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


def say_executor(name: str, plans: dict[int, Plan], rounds: int) -> None:
    """Print the views a second of CPU time, and where the time goes."""
    costs = of_executor(plans, rounds)
    say(
        f"{name}, CPU of an executor",
        [{v: v / cost.image for v, cost in each.items()} for each in costs],
    )
    spent = {
        v: Cost(*(statistics.median(parts) for parts in zip(*(c[v] for c in costs), strict=True)))
        for v in plans
    }
    one, several = spent
    for views, cost in spent.items():
        print(
            f"    {views} views: {1e3 * cost.image:.2f} ms an image, {1e3 * cost.decode:.2f} of it "
            f"decoding, {1e3 * (cost.image - cost.decode) / views:.3f} a view beyond that"
        )
    may = (several / FLOOR * spent[one].image - spent[several].decode) / several
    print(f"    a ratio of {FLOOR:g} needs {1e3 * may:.3f} ms a view beyond decoding")


class Cost(NamedTuple):
    """CPU seconds of a photograph."""

    image: float
    """Reading, decoding and packing all its views."""
    decode: float
    """Its one decode alone, at the scale that its views need."""


def of_executor(plans: dict[int, Plan], rounds: int) -> list[dict[int, Cost]]:
    """Return the costs with each number of views, in each round."""
    keep_freed_memory()
    recipes = {}
    for views, plan in plans.items():
        lane = plan.lane(0)
        recipes[views] = [pack_recipe(plan, lane.next_pack(), 0) for _ in range(4)]
    stored = {
        image.sample_id: read_image(image, 60).image
        for packs in recipes.values()
        for pack in packs
        for image in pack.images
    }
    executor, costs = Executor(None, 60), list[dict[int, Cost]]()
    for _ in range(rounds):
        costs.append({})
        for views, packs in recipes.items():
            images = [image for pack in packs for image in pack.images]
            start = time.process_time()
            for pack in packs:
                executor.execute(pack)
            middle = time.process_time()
            for image in images:
                decode(stored[image.sample_id], scale=image.scale, stored_size=image.stored_size)
            parts = middle - start, time.process_time() - middle
            costs[-1][views] = Cost(*(part / len(images) for part in parts))
    return costs


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
