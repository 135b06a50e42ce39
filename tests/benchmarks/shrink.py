"""Measure what smaller shards bring: images a second, bytes, and the difference in pixels.

    python -m tests.benchmarks.shrink [--images 96] [--side 256] [--workers 1] [--rounds 5]

Photographs of `tests.benchmarks.full_size` are written as shards (JPEG, quality 90) and shrunk. The
loader reads both in turn, at the same sizes, with and without `data.decode.scaled`. Then every
image is decoded from both at the size of its copy, and the pixels are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from data_pipeline.config import DataConfig, DecodeConfig, ResolutionConfig
from data_pipeline.loading.decode import decode_image
from data_pipeline.loading.loader import PackLoader
from data_pipeline.plan.plan import Plan
from data_pipeline.plan.sampling import decode_scales
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.images.smaller import Shrinking
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.shrinking.shrink import shrink_shards
from data_pipeline.shards.tar_reader import read_sample
from tests.benchmarks.full_size import full_size_photographs
from tests.data_pipeline.shard_fixtures import encode

PATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        photos = (
            (f"{number:05d}", {"jpg": encode(image, quality=90)})
            for number, image in enumerate(full_size_photographs(options.images))
        )
        before = build_shards(photos, Path(folder) / "full", seed=None)
        start = time.perf_counter()
        rule = Shrinking(options.side, options.quality)
        shrunk = shrink_shards([s.path for s in before.shards], Path(folder) / "small", rule)
        seconds = time.perf_counter() - start
        after = shrunk.manifest
        sizes = [
            sum(r.bytes_before for r in shrunk.reports),
            sum(r.bytes_after for r in shrunk.reports),
        ]
        print(f"shrunk {options.images / seconds:.0f} images/s; bytes {sizes[0]:,} -> {sizes[1]:,}")
        compare_speed(before, after, options)
        compare_pixels(before, after, options.side)


def compare_speed(before: Manifest, after: Manifest, options: argparse.Namespace) -> None:
    """Read both in turn, and print the medians of their rates."""
    loaders = {
        "before": packs(before, options, scaled=False),
        "before, scaled": packs(before, options, scaled=True),
        "after": packs(after, options, scaled=False),
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(options.rounds):
        for name, loader in loaders.items():
            rates[name].append(rate(loader, options.images))
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["after"], values, strict=True))
        print(f"{name}: {statistics.median(values):.1f} images/s, after / this {ratio:.1f}")
    print(
        f"medians of {options.rounds} rounds, {options.workers} workers; floor of after / before 3"
    )


def packs(manifest: Manifest, options: argparse.Namespace, *, scaled: bool) -> Iterator[int]:
    config = DataConfig(
        token_budget=1024,
        max_images_per_pack=16,
        resolution=ResolutionConfig("native", max=options.side),
        patch_size=PATCH,
        cost_dim=768,
        workers=options.workers,
        decode=DecodeConfig(scaled=scaled),
    )
    for step in PackLoader(Plan(manifest, config, num_lanes=1)).steps(None):
        for pack in step.packs:
            yield pack.num_images


def rate(batches: Iterator[int], images: int) -> float:
    """Return images a second, once what was made ahead is used up."""
    made = 0
    while made < images // 2:
        made += next(batches)
    made, start = 0, time.perf_counter()
    while made < images:
        made += next(batches)
    return made / (time.perf_counter() - start)


def compare_pixels(before: Manifest, after: Manifest, side: int) -> None:
    """Print the differences of pixels, and of the same picture by decoding it at 1/scale."""
    found: dict[str, list[np.ndarray]] = {"shrunk": [], "decoded at DCT scale": []}
    for number in range(len(before.samples)):
        data, small = (image_of(manifest, number) for manifest in (before, after))
        row = after.samples[number]
        size = {"height": int(row["height"]), "width": int(row["width"])}
        shown = decode_image(data, **size).astype(int)
        found["shrunk"].append(np.abs(decode_image(small, **size) - shown))
        scale = decode_scale(before.samples[number], size)
        scaled = decode_image(data, **size, scale=scale)
        found["decoded at DCT scale"].append(np.abs(scaled - shown))
    for name, differences in found.items():
        levels = np.concatenate([difference.ravel() for difference in differences])
        print(
            f"{name}: levels mean {levels.mean():.2f}, p95 {np.percentile(levels, 95):.0f}, "
            f"max {levels.max()}"
        )


def decode_scale(row: np.void, size: dict[str, int]) -> int:
    """Return the scale at which a plan with `data.decode.scaled` decodes."""
    sides = [np.array([float(row[name])]) for name in ("height", "width")]
    target = [np.array([size[name]]) for name in ("height", "width")]
    return int(decode_scales(*sides, *target, patch_size=1)[0])


def image_of(manifest: Manifest, number: int) -> bytes:
    row = manifest.samples[number]
    path = manifest.shards[int(manifest.shard_of(number))].path
    return read_sample(path, int(row["offset"]), int(row["nbytes"])).image


if __name__ == "__main__":
    main()
