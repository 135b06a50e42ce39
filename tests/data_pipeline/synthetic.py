"""Manifests and shards made for tests: sizes like photos, contents like anything."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.config import DataConfig, DropConfig, ResolutionConfig
from data_pipeline.shards.manifest import SAMPLE_DTYPE, Manifest, Shard

CONFIG = DataConfig(
    token_budget=256,
    max_images_per_pack=32,
    resolution=ResolutionConfig("side", 16, 96),
    drop=DropConfig("beta", rate=0.4, max=0.9),
    patch_size=8,
    cost_dim=64,
    workers=0,
)


def config(**changes: object) -> DataConfig:
    """Return the tests' small data config with some fields changed."""
    return replace(CONFIG, **changes)


def synthetic_manifest(shard_counts: list[int], seed: int = 0) -> Manifest:
    """Return a manifest in memory, of shards that do not exist."""
    rng = np.random.default_rng(seed)
    samples = np.zeros(sum(shard_counts), dtype=SAMPLE_DTYPE)
    samples["height"] = rng.integers(20, 200, len(samples))
    samples["width"] = rng.integers(20, 200, len(samples))
    firsts = np.cumsum([0, *shard_counts])
    shards = tuple(
        Shard(f"shard-{i}.tar", 1000, 0, int(firsts[i]), count)
        for i, count in enumerate(shard_counts)
    )
    return Manifest(shards, samples, ("a", "b"), f"synthetic-{seed}", highest_label=0)


def write_shards(folder: Path, shard_counts: list[int], seed: int = 0) -> Path:
    """Write labelled JPEG shards of random sizes; sample n has its number in its key."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for index, count in enumerate(shard_counts):
        with tarfile.open(folder / f"shard-{index:03d}.tar", "w") as tar:
            for _ in range(count):
                height, width = rng.integers(16, 100, 2)
                pixels = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((int(width), int(height)))
                stream = io.BytesIO()
                image.save(stream, "JPEG")
                add_member(tar, f"s{number:05d}.jpg", stream.getvalue())
                add_member(tar, f"s{number:05d}.cls", str(number % 2).encode())
                number += 1
    return folder


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file to an open tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
