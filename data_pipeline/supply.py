"""The rate at which shards give images here, measured on a few hundred of them before a run."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from math import ceil
from multiprocessing.synchronize import Barrier
from threading import BrokenBarrierError
from typing import NamedTuple

import joblib
import torch

from data_pipeline.loading.executor import ExecutedPack, Executor
from data_pipeline.loading.loader import SETTLE_S, begin_worker
from data_pipeline.loading.recipe import PackOrder
from data_pipeline.plan.plan import Plan
from zeta.packed import PackedBatch

IMAGES = 256
SECONDS = 3.0
_LANES = 4
_WAIT_S = 60.0
"""Seconds for the others to have made their first pack: they read the same storage."""


@dataclass(frozen=True)
class Supply:
    """The measured rate of the loader processes of a rank."""

    images_per_s: float
    """Images that one process reads, decodes and packs in a second, beside the others."""
    images: int
    """Images that were measured."""
    pack: PackedBatch
    """One of their packs, of the usual sizes."""
    processes: int = 1
    """Processes that were measured at the same time."""


def measure_supply(
    plan: Plan, *, workers: int = 1, images: int = IMAGES, seconds: float = SECONDS
) -> Supply | None:
    """Execute the first packs of a plan in as many processes as a rank has, and return their rate.

    A core that two processes share as two hyperthreads does not give twice the images of one, so
    they run at the same time. The first pack of each is not timed: it finds cold caches and loads
    the decoder.

    Args:
        plan: the plan of a run.
        workers: loader processes of the run; 0: this process decodes. No more are started than
            there are cores.
        images: about the number of images to measure, of all processes; each makes a pack at least.
        seconds: time after which it is enough.

    Returns:
        The rate; None if no image could be measured, such as with a single pack, or if a process
        ended or kept the others waiting too long.

    Raises:
        OSError, TarError: a shard cannot be read.
    """
    orders = _orders(plan)
    first = next(orders, None)
    if first is None or first.pack is None:
        return None
    count = max(1, min(workers, joblib.cpu_count()))
    timed_of_each = max(1, ceil(images / (count * len(first.pack.sample_ids))))
    packs = [first, *itertools.islice(orders, count * (1 + timed_of_each) - 1)]
    count = min(count, len(packs) // 2)
    if count == 0:
        return None
    parts = [packs[number::count] for number in range(count)]
    runs = [_run(plan, parts[0], seconds)] if workers == 0 else _together(plan, parts, seconds)
    done = sum(run.images for run in runs)
    if not done:
        return None
    rate = sum(run.images / run.seconds for run in runs) / len(runs)
    return Supply(rate, done, runs[0].last.batch, len(runs))


class _Run(NamedTuple):
    images: int
    seconds: float
    last: ExecutedPack


def _orders(plan: Plan) -> Iterator[PackOrder]:
    """Yield the packs of a few lanes in turn, up to the end of one of them."""
    lanes = [plan.lane(lane) for lane in range(min(plan.num_lanes, _LANES))]
    for lane in itertools.cycle(lanes):
        pack = lane.next_pack()
        if pack is None:
            return
        yield PackOrder(pack, lane.epoch)


def _together(plan: Plan, parts: Sequence[Sequence[PackOrder]], seconds: float) -> list[_Run]:
    """Return the run of each part, each in a process of its own, over the same time.

    None of them, if a process ended or was too slow to begin with the others.
    """
    context = multiprocessing.get_context("fork")  # as the loader's; they start at once
    started = context.Barrier(len(parts), timeout=_WAIT_S)
    time.sleep(SETTLE_S)
    with ProcessPoolExecutor(len(parts), context, _begin, (plan, started)) as pool:
        futures = [pool.submit(_run_beside_others, part, seconds) for part in parts]
        errors = [error for future in futures if (error := future.exception()) is not None]
        # A process that failed broke the barrier of the others, which say nothing of it.
        errors.sort(key=lambda error: isinstance(error, BrokenBarrierError | BrokenProcessPool))
        if errors and not isinstance(errors[0], BrokenBarrierError | BrokenProcessPool):
            raise errors[0]
        if errors:
            return []
        return [future.result() for future in futures]


_plan: Plan
_started: Barrier


def _begin(plan: Plan, started: Barrier) -> None:
    """Prepare a process as a worker of the loader is."""
    global _plan, _started
    _plan, _started = plan, started
    torch.set_num_threads(1)
    begin_worker(0)
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()


def _end_with(rank: int) -> None:
    """End this process once `rank`, which started it, is gone: a killed one cannot ask it to."""
    while os.getppid() == rank:
        time.sleep(1)
    os._exit(0)


def _run_beside_others(orders: Sequence[PackOrder], seconds: float) -> _Run:
    try:
        return _run(_plan, orders, seconds, _started)
    except Exception:
        _started.abort()
        raise


def _run(
    plan: Plan, orders: Sequence[PackOrder], seconds: float, started: Barrier | None = None
) -> _Run:
    """Execute packs for some seconds, the first one untimed, then beside all that wait for it."""
    executor = Executor(plan.manifest.class_names, plan.config.read_deadline_s)
    last = executor.execute(orders[0].recipe(plan))
    if started is not None:
        started.wait()
    images, began = 0, time.perf_counter()
    for order in orders[1:]:
        last = executor.execute(order.recipe(plan))
        images += last.batch.num_images
        if time.perf_counter() - began > seconds:
            break
    return _Run(images, time.perf_counter() - began, last)
