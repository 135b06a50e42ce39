"""CPU time of a training process for each image: plan, receive, join.

    python -m tests.benchmarks.loading.rank_cpu [--lanes 30] [--steps 6] [--rounds 5] [--workers 1]

It plays one of eight ranks of navit_b16_classification (240 packs a step) on 1.3 million images
whose sizes are those of photographs. What a rank does does not depend on what is in the images, so
its executors make grey ones at once, which takes no time from it. Medians of rounds, in
microseconds of CPU:

    plan      orders of packs: sizes, dropped patches, packing
    receive   the packs of a step, from the executors to a `StepPacks`
    threads   other threads of the process: they send the orders
    join      all packs of the step in the memory of one forward pass (on a GPU: page-locked, and
              copied from there by the device)
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.loading import executor
from data_pipeline.loading.fetch import SampleReader
from data_pipeline.loading.loader import PackLoader
from data_pipeline.loading.recipe import ImageRecipe, PackOrder
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.sample import Sample
from tests.benchmarks.web_scale import web_plan
from zeta.packed import join_packs

IMAGES, SHARDS = 1_280_000, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, default=30)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = measure(local_plan(options.lanes, options.workers), options.steps, options.rounds)
    for part in rounds[0]:
        figures = [found[part] for found in rounds]
        print(f"{part:8} {statistics.median(figures):6.1f} (least {min(figures):.1f})")


def local_plan(lanes: int, workers: int) -> Plan:
    """Return a plan of the shipped recipe, with rows in memory as those of a mapped index are."""
    plan = web_plan(IMAGES, SHARDS, lanes)
    shards = tuple(
        replace(shard, path=f"/nowhere/{number}.tar")
        for number, shard in enumerate(plan.manifest.shards)
    )
    plan.manifest = replace(plan.manifest, shards=shards, samples=plan.manifest.samples[:])
    plan.config = replace(plan.config, workers=workers)
    return plan


def measure(plan: Plan, steps: int, rounds: int) -> list[dict[str, float]]:
    """Return the microseconds an image of each part, in each round of some steps."""
    planned = 0.0
    orders_of = PackLoader._orders

    def timed_orders(loader: PackLoader, state: None, first: int) -> Iterator[PackOrder]:
        nonlocal planned
        orders = orders_of(loader, state, first)
        while True:
            start = time.thread_time()
            order = next(orders)
            planned += time.thread_time() - start
            yield order

    def samples(
        _reader: SampleReader, images: Sequence[ImageRecipe], _at_once: int
    ) -> Iterator[tuple[list[Sample], float]]:
        return iter([([Sample("key", {"jpg": b"", "cls": b"0"})] * len(images), 0.0)])

    found = []
    with (
        patch.object(PackLoader, "_orders", timed_orders),
        patch.object(SampleReader, "read", samples),
        patch.object(executor, "decode_views", grey_views),
    ):
        source = PackLoader(plan).steps(None)
        join_packs(next(source).packs, "cpu")
        for _ in range(rounds):
            images, joined = 0, 0.0
            planned, start, main = 0.0, time.process_time(), time.thread_time()
            for step in (next(source) for _ in range(steps)):
                before = time.thread_time()
                join_packs(step.packs, "cpu")
                joined += time.thread_time() - before
                images += step.num_images
            main, total = time.thread_time() - main, time.process_time() - start
            parts = {
                "plan": planned,
                "receive": main - planned - joined,
                "threads": total - main,
                "join": joined,
                "all": total,
            }
            found.append({name: 1e6 * seconds / images for name, seconds in parts.items()})
        source.close()
    return found


def grey_views(
    _data: bytes, image: ImageRecipe, side: int, _fit: str
) -> Iterator[NDArray[np.uint8]]:
    """Yield grey views in the place of decoded ones."""
    for view in image.views:
        yield np.full((view.grid[0] * side, view.grid[1] * side, 3), 127, dtype=np.uint8)


if __name__ == "__main__":
    main()
