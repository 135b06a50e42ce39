"""The loader benchmark: its rate of images against the bare decoding of the same images."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from data_pipeline.loading.executor import ExecutedPack, StageTimes, decode_views
from data_pipeline.loading.fetch import read_image
from data_pipeline.loading.loader import PackLoader, num_workers
from data_pipeline.loading.recipe import ImageRecipe, PackOrder
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.images.header import ImageError
from data_pipeline.shards.parallel import SpawnPool
from zeta.run.cpu_tuning import keep_freed_memory

_DECODE_IMAGES = 1024
"""So many that they have as many pixels, decoded and resized, as the loader's: within 4%."""
_START_S = 0.2
_LANES = 4
_PREFETCH = 4
"""Packs that each worker is asked for ahead: those of a round begin with an empty queue, so that a
whole step ahead, as in training, would only take longer."""


@dataclass(frozen=True)
class BenchResult:
    """The measurements of `zeta data bench`."""

    images_per_s: float
    """Images a second from shards to packs, with `data.workers` processes; each view of a sample
    is an image."""
    decode_bound_images_per_s: float
    """Images a second if the same number of processes only decode and resize the images of the
    first packs, from memory."""
    efficiency: float
    """Ratio of the two rates, measured in turn; median over rounds."""
    cpu_efficiency: float
    """Ratio of the two rates by CPU time of all processes, which is steadier on a busy machine."""
    workers: int
    images: int
    """Number of images timed."""
    stages: dict[str, float]
    """Milliseconds per image: `process_ms`, CPU time of the training process, with the planning of
    `plan_ms`; `wait_ms`, which it waits; `read_ms`, `decode_ms` and `pack_ms` of an executor; and
    `queue_occupancy`, the mean share of the prefetch
    queue that is ready when a pack is asked for."""


def bench(plan: Plan, *, packs: int = 32, rounds: int = 5) -> BenchResult:
    """Measure the loader on the first packs of a plan.

    Args:
        plan: the plan; `data.workers` of its config is the number of decoding processes.
        packs: number of packs timed in a round.
        rounds: number of rounds. Loader and bare decoding take turns, and neither works while the
            other is measured; the result has medians.
    """
    workers = num_workers(plan.config)
    orders = _TimedOrders(plan)
    loader, queue = PackLoader(plan), _PREFETCH * workers
    decode_loop = _DecodeLoop(orders.first_images(_DECODE_IMAGES), plan, max(workers, 1))
    runs, bounds = [], [decode_loop.run()]
    for _ in range(rounds):
        # The first packs are those of a pipeline that fills, the last ones of one that empties.
        few = itertools.islice(orders, queue + workers + packs + queue)
        made_packs = loader.executed(few, _PREFETCH)
        for _ in range(queue + workers):
            next(made_packs)
        runs.append(_Run(made_packs, packs))
        for _ in made_packs:
            pass
        bounds.append(decode_loop.run())
    decode_loop.close()
    pairs = [(run, _mean(*around)) for run, around in zip(runs, pairwise(bounds), strict=True)]
    images = sum(run.images for run in runs)
    made = [pack.times for run in runs for pack in run.made]
    return BenchResult(
        images_per_s=statistics.median(run.images_per_s for run in runs),
        decode_bound_images_per_s=statistics.median(bound.images_per_s for bound in bounds),
        efficiency=statistics.median(run.images_per_s / bound.images_per_s for run, bound in pairs),
        cpu_efficiency=statistics.median(bound.cpu_s / run.cpu_s for run, bound in pairs),
        workers=workers,
        images=images,
        stages={
            "process_ms": 1e3 * statistics.median(run.process_s for run in runs),
            "plan_ms": 1e3 * orders.seconds / orders.images,
            "wait_ms": 1e3 * sum(sum(run.waits) for run in runs) / images,
            "read_ms": 1e3 * sum(times.read for times in made) / images,
            "decode_ms": 1e3 * sum(times.decode for times in made) / images,
            "pack_ms": 1e3 * sum(times.pack for times in made) / images,
            "queue_occupancy": statistics.mean(run.ready() for run in runs) / max(queue, 1),
        },
    )


class _TimedOrders(Iterator[PackOrder]):
    """The orders of a few lanes in turn, and the time spent on planning them."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._lanes = itertools.cycle(
            [plan.lane(lane) for lane in range(min(plan.num_lanes, _LANES))]
        )
        self._first: list[PackOrder] = []
        self.seconds, self.images = 0.0, 0

    def __next__(self) -> PackOrder:
        if self._first:
            return self._first.pop(0)
        start = time.perf_counter()
        lane = next(self._lanes)
        order = PackOrder(lane.next_pack(), lane.epoch)
        self.seconds += time.perf_counter() - start
        self.images += 0 if order.pack is None else len(order.pack.sample_ids)
        return order

    def first_images(self, count: int) -> list[ImageRecipe]:
        """Return at least `count` images of the next packs, without taking the packs."""
        orders: list[PackOrder] = []
        images: list[ImageRecipe] = []
        while len(images) < count:
            orders.append(next(self))
            if orders[-1].pack is None:
                break
            images += orders[-1].recipe(self._plan).images
        self._first = orders
        return images


class _Made(NamedTuple):
    """What is kept of a pack: its patches go back to the executors, as in training."""

    images: int
    times: StageTimes


class _Run:
    """A number of packs taken from the loader as fast as possible."""

    def __init__(self, loader: Iterator[ExecutedPack], packs: int) -> None:
        self.asked, self.waits, self.made = list[float](), list[float](), list[_Made]()
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(packs):
            self.asked.append(time.monotonic())
            pack = next(loader)
            self.waits.append(time.monotonic() - self.asked[-1])
            self.made.append(_Made(int((pack.batch.sample_ids >= 0).sum()), pack.times))
        self.images = sum(pack.images for pack in self.made)
        self.images_per_s = self.images / (time.perf_counter() - start)
        self.process_s = (time.process_time() - cpu_start) / self.images
        """CPU seconds per image of this process."""
        executors = 0.0 if self._in_this_process() else self._executor_cpu_s()
        self.cpu_s = self.process_s + executors
        """CPU seconds per image, of this process and the executors."""

    def _in_this_process(self) -> bool:
        return self.made[0].times.process == os.getpid()

    def _executor_cpu_s(self) -> float:
        """Return the CPU seconds per image of the executors, from their first pack on."""
        seconds, images = 0.0, 0
        for process in {pack.times.process for pack in self.made}:
            own = [pack for pack in self.made if pack.times.process == process]
            seconds += own[-1].times.cpu_at - own[0].times.cpu_at
            images += sum(pack.images for pack in own[1:])
        return seconds / max(images, 1)

    def ready(self) -> float:
        """Return the mean number of finished packs that waited when one was asked for."""
        finished = [pack.times.finished_at for pack in self.made]
        return statistics.mean(
            sum(at <= asked for at in finished[number:]) for number, asked in enumerate(self.asked)
        )


class _Rate(NamedTuple):
    images_per_s: float
    cpu_s: float
    """CPU seconds per image."""


def _mean(*rates: _Rate) -> _Rate:
    return _Rate(*(statistics.mean(values) for values in zip(*rates, strict=True)))


class _DecodeLoop:
    """A pool of processes that do nothing but decode and resize images from memory."""

    def __init__(self, images: Sequence[ImageRecipe], plan: Plan, workers: int) -> None:
        self._arguments = (list(images), plan.patch_size, plan.config.resolution.fit)
        self._workers = workers
        self._pool = SpawnPool(workers)

    def run(self) -> _Rate:
        """Return the rate of all processes together, measured over the same time."""
        futures = [self._pool.submit(_decode_all, *self._arguments) for _ in range(self._workers)]
        rates = [future.result() for future in futures]
        return _Rate(
            sum(rate.images_per_s for rate in rates), statistics.mean(rate.cpu_s for rate in rates)
        )

    def close(self) -> None:
        """End the processes."""
        self._pool.end()


_samples: dict[int, bytes] = {}
"""Encoded images that this process of `_DecodeLoop` has read."""


def _decode_all(images: list[ImageRecipe], patch_size: int, fit: str) -> _Rate:
    torch.set_num_threads(1)
    keep_freed_memory()  # as the executors do
    for image in images:
        if image.sample_id not in _samples:
            _samples[image.sample_id] = read_image(image, deadline_s=60).image
    # All processes begin at the same moment, so that they share the cores throughout.
    time.sleep(_START_S - time.time() % _START_S)
    start, cpu_start = time.perf_counter(), time.process_time()
    for image in images:
        try:
            for _ in decode_views(_samples[image.sample_id], image, patch_size, fit):
                pass
        except ImageError:
            continue
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    made = sum(len(image.views) for image in images)
    return _Rate(made / seconds, cpu / made)
