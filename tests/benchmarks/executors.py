"""Measure how much executors slow training: one decoding thread against one process.

    python -m tests.benchmarks.executors SHARDS [--rounds 7]

The training process is played by a loop of small tensor operations, which holds the GIL as a
training step that waits for no device does. Alone, beside a thread that makes packs, and beside a
process that makes them, in turn; prints medians of the time a step takes, relative to alone.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import threading
import time
from multiprocessing.synchronize import Event as ProcessEvent

import torch

from data_pipeline.loading.executor import Executor
from data_pipeline.loading.recipe import pack_recipe
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.manifest import Manifest
from tests.benchmarks.loader import config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {"alone": [], "thread": [], "process": []}
    for _ in range(options.rounds):
        times["alone"].append(step_ms())
        stop = threading.Event()
        thread = threading.Thread(target=make_packs, args=(options.shards, stop))
        times["thread"].append(beside(thread, stop))
        ended = multiprocessing.get_context("spawn").Event()
        process = multiprocessing.get_context("spawn").Process(
            target=make_packs, args=(options.shards, ended)
        )
        times["process"].append(beside(process, ended))
    for name in ("thread", "process"):
        ratios = [a / b for a, b in zip(times[name], times["alone"], strict=True)]
        print(f"a step beside a {name}: {statistics.median(ratios):.2f} x alone")


def beside(
    worker: threading.Thread | multiprocessing.process.BaseProcess,
    stop: threading.Event | ProcessEvent,
) -> float:
    worker.start()
    time.sleep(6)  # until it makes packs
    result = step_ms()
    stop.set()
    worker.join()
    return result


def step_ms(steps: int = 300) -> float:
    x, y = torch.ones(64), torch.ones(64)
    start = time.perf_counter()
    for _ in range(steps):
        for _ in range(200):
            x = x + y
    return 1e3 * (time.perf_counter() - start) / steps


def make_packs(shards: str, stop: threading.Event | ProcessEvent) -> None:
    torch.set_num_threads(1)
    manifest = Manifest.open(shards)
    plan = Plan(manifest, config(1), num_lanes=1)
    lane, executor = plan.lane(0), Executor(manifest.class_names, 60)
    recipes = [pack_recipe(plan, lane.next_pack(), 0) for _ in range(8)]
    for recipe in itertools.cycle(recipes):
        executor.execute(recipe)
        if stop.is_set():
            return


if __name__ == "__main__":
    main()
