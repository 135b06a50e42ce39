"""Say before a run which of GPU and loader will bind, and how long the run will take."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.plan.summary import summarise
from data_pipeline.supply import Supply, measure_supply
from launch.report.logged_run import read_run
from launch.run.checks import CheckedRun, abstract_model
from launch.run.length import RunLength, duration, length_by_plan
from launch.run.workers import loader_workers
from zeta import metric_names as names
from zeta.config_field import AUTO
from zeta.models.flops import CountsFlops
from zeta.train.hardware import Accelerator
from zeta.train.pace import Pace, predicted_pace

_LOGS = 20
"""Number of lines of metrics whose utilisation counts as that of the run."""
_LEAST_SUPPLY = 0.1
"""Supply ratio below which a step says nothing of the device."""


@dataclass(frozen=True)
class Forecast:
    """The rates of a run, in images a second of one rank, as far as they are known."""

    need: Pace | None
    """What the GPU takes; None: the GPU, its peak or the model's operations are not known."""
    supply: Supply | None
    """What a loader process gives here beside the others of a rank; None: the shards hold too few
    images to measure."""
    workers: int
    """Loader processes of a rank; 0: the training process decodes."""

    @property
    def supplied(self) -> float | None:
        """Images a second that the loader of a rank gives."""
        return None if self.supply is None else self.supply.images_per_s * max(self.workers, 1)

    @property
    def rate(self) -> float | None:
        """Images a second of a rank, by the slower of the two; None: either is not known."""
        if self.need is None or self.supplied is None:
            return None
        return min(self.need.images_per_s, self.supplied)

    @property
    def loader_binds(self) -> bool:
        """Whether the loader is the slower of the two."""
        return self.need is not None and self.rate is not None and self.rate == self.supplied


def run_length(checked: CheckedRun, world_size: int) -> RunLength:
    """Return the length of a run that was checked, by the nearest of its limits."""
    summary = summarise(checked.plan, world_size)
    seen = 0 if checked.saved is None else int(checked.saved["progress"]["images"])
    return length_by_plan(checked.config.train, checked.plan, summary, seen)


def forecast(checked: CheckedRun, gpu: Accelerator | None) -> Forecast:
    """Measure the supply of a run here for some seconds, and predict the need of a GPU.

    Args:
        checked: the run.
        gpu: the GPU of each rank; None: not known.

    Raises:
        OSError, TarError: a shard cannot be read.
    """
    config, need = checked.config, None
    workers = int(checked.plan.config.workers)
    if gpu is not None and config.data.workers == AUTO:  # a rank of the job, not of this machine
        own = config.cluster.cpus_per_task
        here = {"SLURM_CPUS_PER_TASK": str(own)} if own else {}
        workers = loader_workers(config, dict(os.environ) | here, on_gpu=True)
    supply = measure_supply(checked.plan, workers=workers)
    model = abstract_model(config)
    peak = config.train.peak_tflops
    if peak is None and gpu is not None:
        peak = gpu.peak_tflops(config.train.dtype)
    if supply is not None and peak is not None and isinstance(model, CountsFlops):
        per_image = model.training_flops(supply.pack) / supply.pack.num_images
        width = int(config.model.resolve()["dim"])
        need = predicted_pace(per_image, peak, width, logged_mfu(checked.run_dir.path))
    return Forecast(need, supply, workers)


def logged_mfu(run_dir: Path) -> float | None:
    """Return the utilisation that a run has logged lately, without the time of waiting for data.

    None: it has logged none.
    """
    try:
        series = read_run(run_dir).series
    except ValueError:  # not begun
        return None
    if names.MFU not in series:
        return None
    logged, supplied = series[names.MFU], series.get(names.SUPPLY_RATIO)
    ratios = {} if supplied is None else dict(zip(supplied.steps, supplied.values, strict=True))
    found = [
        mfu / ratio
        for step, mfu in zip(logged.steps, logged.values, strict=True)
        if (ratio := ratios.get(step, 1.0)) >= _LEAST_SUPPLY
    ]
    return statistics.median(found[-_LOGS:]) if found else None


def pace_rows(found: Forecast, world_size: int, images: float | None) -> Iterator[tuple[str, str]]:
    """Yield what there is to say of need, supply, what binds, and how long it takes.

    Args:
        found: the rates of a rank.
        world_size: W.
        images: images to the end of the run; None: it has no end, or it is not asked for.

    Returns:
        Pairs of a subject of one word and a finding.
    """
    need, supply = found.need, found.supply
    if need is None:
        yield "need", "not known without the GPU: give --gpu NAME, or train.peak_tflops"
    else:
        yield (
            "need",
            f"{need.images_per_s:,.0f} images/s of a rank, at MFU {need.mfu:.2f} ({need.source})",
        )
    if supply is None:
        yield "supply", "not measured: the shards hold less than two packs"
    else:
        processes = f"{found.workers} workers" if found.workers else "the training process"
        beside = f", {supply.processes} at a time" if supply.processes > 1 else ""
        yield (
            "supply",
            f"{found.supplied:,.0f} images/s of a rank: {processes}, {supply.images_per_s:,.0f} a "
            f"process, measured on {supply.images} images here{beside}",
        )
    if need is None or found.rate is None:
        return
    yield "binds", binding(found)
    if images is not None:
        seconds = images / (found.rate * world_size)
        yield (
            "time",
            f"{duration(seconds)} on {world_size} ranks, {world_size * seconds / 3600:,.1f} "
            "GPU-hours, if each has the cores and storage of this machine; evaluation, "
            "checkpoints, restarts and the exchange of gradients are not counted",
        )


def binding(found: Forecast) -> str:
    """Return what limits the rate, and what to change if that is the loader."""
    assert found.need is not None
    assert found.supplied is not None
    share = found.supplied / found.need.images_per_s
    if not found.loader_binds:
        return f"the GPU: the loader gives {share:.2g} times what it takes"
    return (
        f"the loader, which gives {share:.0%} of what the GPU takes: more cores for data.workers, "
        "smaller images (`zeta shards shrink`), or several views of each (data.views)"
    )
