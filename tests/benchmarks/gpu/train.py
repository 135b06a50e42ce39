"""`zeta train` as shipped, on shards of random JPEGs with the shapes of photographs.

They are as large as the recipes take them, 256 x 256 pixels in area at most, and of quality 75: on
whole photographs, 16 cores would measure the loader, not the card.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import joblib

from data_pipeline.shards.build import build_shards
from data_pipeline.shards.index import index_shards
from tests.benchmarks.gpu.common import Options, Row, guarded
from tests.data_pipeline.photographs import photo_sizes, photograph
from tests.data_pipeline.shard_fixtures import encode

PRESETS = {"navit_b16": 5, "navit_l16": 4}
"""Steps of a run, of which the first ones are not counted. A step has 240 packs, as shipped."""
UNCOUNTED = 2
LARGEST, QUALITY = 256, 75
"""Root of the area of the largest picture, in pixels, and the quality of the JPEGs."""
METRICS = {
    "throughput/images_per_s": "images_per_s",
    "throughput/mfu": "mfu",
    "time/step_s": "step_s",
    "time/data_wait_s": "data_wait_s",
    "time/host_s": "host_s",
    "time/device_s": "device_s",
    "memory/peak_gib": "peak_gib",
}
TO_END = ("train.log_every=1", "train.checkpoint_every=null", "tracker.wandb.mode=disabled")
TO_END += ("optim.schedule=constant", "optim.warmup_steps=0", "optim.cooldown_steps=0")
"""What lets a run end after a few steps, and each be read: nothing that changes its speed."""
TOY = ("model.preset=navit_ti16", "model.depth=1", "data.token_budget=256", "data.workers=0")
TOY += ("data.max_images_per_pack=16", "train.packs_per_step=1", "train.max_steps=3")
TOY += ("train.device=cpu", "train.compile=false", "train.peak_tflops=1")


def rows(options: Options) -> Iterator[Row]:
    return rows_of(PRESETS, options)


def rows_of(presets: Mapping[str, int], options: Options) -> Iterator[Row]:
    shards = write_shards(
        options.out / "shards", *((8, 40, 1) if options.toy else (100, 10000, 24))
    )
    names = list(presets)[:1] if options.toy else list(presets)
    return guarded(
        (f"zeta train {name}", partial(case, name, presets[name], shards, options))
        for name in names
    )


def write_shards(folder: Path, different: int, count: int, copies: int) -> Path:
    """`copies` shards of `count` samples, made of `different` pictures, unless they are there.

    With fewer samples, each lane of a run has a few packs an epoch: planning would take the time.
    """
    whole = folder.with_name("shards-are-whole")
    if whole.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run that was stopped
    pictures = [
        encode(photograph(*shrunk(height, width), number), quality=QUALITY)
        for number, (height, width) in enumerate(photo_sizes(different))
    ]
    samples = (
        (f"{number:06d}", {"jpg": pictures[number % different], "cls": b"%d" % (number % 1000)})
        for number in range(count)
    )
    names = [f"class-{number}" for number in range(1000)]
    build_shards(samples, folder, max_size_mb=1e6, class_names=names)
    (shard,) = folder.glob("*.tar")
    for number in range(1, copies):
        shutil.copy(shard, folder / f"shard-{number:06d}.tar")
    index_shards(folder, workers=joblib.cpu_count())
    whole.touch()
    return folder


def shrunk(height: int, width: int) -> tuple[int, int]:
    """Return height and width of the same shape, of at most `LARGEST` squared pixels."""
    factor = min(1.0, LARGEST / (height * width) ** 0.5)
    return round(factor * height), round(factor * width)


def case(preset: str, steps: int, shards: Path, options: Options) -> Row:
    run = options.out / f"run-{preset}"
    own = (f"data.shards={shards}", f"run.dir={run}", f"model.preset={preset}")
    sizes = TOY if options.toy else (f"train.max_steps={steps}",)
    command = [sys.executable, "-m", "launch", "train", "navit_b16_classification"]
    done = subprocess.run([*command, *own, *TO_END, *sizes], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    return read(run / "metrics.jsonl", UNCOUNTED)


def read(metrics: Path, warmup: int) -> Row:
    """Medians of the steps after the first ones."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if "time/step_s" in line][warmup:]
    found = {
        short: [line[name] for line in steps if line.get(name) is not None]
        for name, short in METRICS.items()
    }
    return {short: statistics.median(values) for short, values in found.items() if values}
