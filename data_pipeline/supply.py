"""The rate at which shards give images here, measured on a few hundred of them before a run."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

from data_pipeline.loading.executor import Executor
from data_pipeline.loading.recipe import pack_recipe
from data_pipeline.plan.plan import Plan
from zeta.packed import PackedBatch

IMAGES = 256
SECONDS = 3.0


@dataclass(frozen=True)
class Supply:
    """The measured rate of one loader process."""

    images_per_s: float
    """Images that one process reads, decodes and packs in a second."""
    images: int
    """Images that were measured."""
    pack: PackedBatch
    """One of their packs, of the usual sizes."""


def measure_supply(plan: Plan, *, images: int = IMAGES, seconds: float = SECONDS) -> Supply | None:
    """Execute the first packs of a plan in this process, and return its rate.

    The first pack is not timed: it finds cold caches and loads the decoder.

    Args:
        plan: the plan of a run.
        images: number of images after which it is enough.
        seconds: time after which it is enough.

    Returns:
        The rate; None if no image could be measured, such as with a single pack.

    Raises:
        OSError, TarError: a shard cannot be read.
    """
    executor = Executor(plan.manifest.class_names, plan.config.read_deadline_s)
    lanes = itertools.cycle([plan.lane(lane) for lane in range(min(plan.num_lanes, 4))])
    done, began = 0, 0.0
    for number, lane in enumerate(lanes):
        pack = lane.next_pack()
        if pack is None:
            break
        batch = executor.execute(pack_recipe(plan, pack, lane.epoch)).batch
        if number == 0:
            began = time.perf_counter()
            continue
        done += batch.num_images
        if done >= images or time.perf_counter() - began > seconds:
            break
    return Supply(done / (time.perf_counter() - began), done, batch) if done else None
