"""zeta's loader against bare decoding and timm's NaFlex loader, on photograph-like JPEGs.

    python -m tests.benchmarks.loader [--workers 1] [--rounds 9] [--images 400]

The images are those of `tests/data_pipeline/photographs.py`, as files for timm and as shards for
zeta. Both resize to at most 256 patches of 16 pixels, keep the aspect ratio, drop nothing and
augment nothing; zeta decodes at DCT scale where its plan allows. They take turns, and medians of
ratios count.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from data_pipeline.bench import bench
from data_pipeline.config import DataConfig, ResolutionConfig
from data_pipeline.loading.loader import PackLoader
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.manifest import Manifest
from tests.benchmarks.peers import peer_imports
from tests.data_pipeline.photographs import photo_sizes, photograph
from tests.data_pipeline.shard_fixtures import encode

PATCH, PATCHES = 16, 256
TIMM_FLOOR, DECODE_FLOOR = 2.0, 0.85
_CLASSES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--images", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photos(Path(folder) / "photos", options.images)
        shards = build_shards(photos, Path(folder) / "shards")
        compare(photos, shards, options.workers, options.rounds)


def write_photos(folder: Path, count: int) -> Path:
    for number, (height, width) in enumerate(photo_sizes(count)):
        path = folder / str(number % _CLASSES) / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photograph(height, width, number), quality=90))
    return folder


def compare(photos: Path, manifest: Manifest, workers: int, rounds: int) -> None:
    # One lane, for a real one plans windows of thousands of images, and here there are hundreds.
    plan = Plan(manifest, config(workers), num_lanes=1)
    packs = zeta_batches(plan)
    batches = timm_batches(photos, workers)
    ratios = []
    for _ in range(rounds):
        ours = rate(packs, images=len(manifest.samples))
        theirs = rate(batches, images=len(manifest.samples))
        ratios.append(ours / theirs)
        print(
            f"zeta {ours:7.0f}  timm {theirs:7.0f} images/s  ratio {ours / theirs:.2f}", flush=True
        )
    packs.close()
    batches.close()
    result = bench(plan, packs=48, rounds=rounds)
    print(f"{workers} workers, medians of {rounds} rounds")
    print(f"zeta / timm            {statistics.median(ratios):.2f}   (floor {TIMM_FLOOR})")
    print(f"zeta / bare decoding   {result.efficiency:.2f}   (floor {DECODE_FLOOR})")
    print(f"the same by CPU time   {result.cpu_efficiency:.2f}")
    print({name: round(value, 3) for name, value in result.stages.items()})


def config(workers: int) -> DataConfig:
    return DataConfig(
        token_budget=4096,
        max_images_per_pack=64,
        resolution=ResolutionConfig("native", max=int(PATCHES**0.5) * PATCH),
        patch_size=PATCH,
        cost_dim=768,
        workers=workers,
    )


def zeta_batches(plan: Plan) -> Iterator[int]:
    for step in PackLoader(plan).steps(None):
        for pack in step.packs:
            yield pack.num_images


def timm_batches(photos: Path, workers: int) -> Iterator[int]:
    with peer_imports():
        from timm.data import create_dataset, create_naflex_loader

    dataset = create_dataset("", root=str(photos))
    loader = create_naflex_loader(
        dataset,
        patch_size=PATCH,
        train_seq_lens=(PATCHES,),
        max_seq_len=PATCHES,
        batch_size=16,
        is_training=True,
        no_aug=True,
        interpolation="bicubic",
        num_workers=workers,
        use_prefetcher=False,
        pin_memory=False,
        device=torch.device("cpu"),
        persistent_workers=True,
    )
    for epoch in itertools.count():
        if hasattr(loader.dataset, "set_epoch"):
            loader.dataset.set_epoch(epoch)
        for batch in loader:
            yield len(batch[1])


def rate(batches: Iterator[int], images: int) -> float:
    """Images a second, once what was made ahead is used up."""
    made = 0
    while made < images // 2:
        made += next(batches)
    made, start = 0, time.perf_counter()
    while made < images:
        made += next(batches)
    return made / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
