"""The data of a run at the scale of the web: what each rank spends, without the data.

    python -m tests.benchmarks.web_scale [--samples 1000000000] [--shards 100000] [--ranks 4096]
        [--packs 8192] [--views 1,4] [--balance 1024x25,32x1000]
        [--parts start,count,index,plan,balance]

The shards are empty files and their index an array of zeros that takes no room on a disk: enough to
start as a rank does. Plans are made from samples whose sizes are computed from their ids, so that
nothing but the plan itself is in memory. Straggler ratio and fill are those of some of the lanes
over a number of steps, for images and for views. Seconds are CPU seconds. Prints one JSON object a
line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

import data_pipeline.plan.plan
from data_pipeline.config import AugmentConfig, DataConfig, DropConfig, ResolutionConfig
from data_pipeline.loading.recipe import pack_recipe
from data_pipeline.plan.lane_packer import LaneState
from data_pipeline.plan.packing import image_costs
from data_pipeline.plan.plan import Plan
from data_pipeline.plan.random_draws import hashes
from data_pipeline.shards.checksum import CHECKSUM_DTYPE, rows_digest
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import ImageFormat, Manifest, Shard, Share
from data_pipeline.shards.manifest_files import (
    READER,
    SAMPLE_DTYPE,
    FolderIndex,
    ShardEntry,
    write_entries,
)
from data_pipeline.shards.masses import ShardMasses
from tests.data_pipeline.photographs import photo_sizes, photograph
from tests.data_pipeline.shard_fixtures import encode, write_shard
from zeta.packed import lanes_of_rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10**9)
    parser.add_argument("--shards", type=int, default=10**5)
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--packs", type=int, default=8192)
    parser.add_argument("--views", default="1,4")
    parser.add_argument("--balance", default="1024x25,32x1000", help="lanes x steps, ...")
    parser.add_argument("--parts", default="start,count,index,plan,balance")
    measure(parser.parse_args())


def measure(options: argparse.Namespace) -> None:
    samples, shards = options.samples, options.shards
    ranks, packs, parts = options.ranks, options.packs, options.parts.split(",")
    with tempfile.TemporaryDirectory() as folder:
        if "start" in parts:
            say("start of a rank", measure_start(Path(folder), samples, shards, ranks))
    if "count" in parts:
        say("first count of all samples", measure_count(samples, shards, packs))
    if "index" in parts:
        with tempfile.TemporaryDirectory() as folder:
            say("index of a shard by one process", measure_index(Path(folder), samples, shards))
    for views in map(int, options.views.split(",")):
        if "plan" in parts:
            found = measure_rank(samples, shards, ranks, packs, views)
            say(f"plan of a rank, {views} views", found)
        for lanes, steps in sizes(options.balance) if "balance" in parts else ():
            plan = web_plan(samples, shards, packs, views)
            some = range(0, packs, packs // lanes)
            found = balance(plan, some, steps, max(1, lanes * ranks // packs))
            say(f"{lanes} lanes of {packs}, {views} views", found)


def sizes(text: str) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, _, b in (part.partition("x") for part in text.split(","))]


def say(what: str, found: dict[str, float]) -> None:
    print(json.dumps({"what": what} | {k: float(f"{v:.5g}") for k, v in found.items()}), flush=True)


class ComputedRows:
    """Manifest rows [N] that are computed from their ids: JPEGs as large as photographs are."""

    dtype = SAMPLE_DTYPE

    def __init__(self, count: int) -> None:
        self._count = count
        self._sizes = np.array(photo_sizes(500))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> NDArray[np.void]:
        ids = (
            np.arange(*index.indices(self._count))
            if isinstance(index, slice)
            else np.asarray(index)
        )
        rows = np.zeros(len(ids), dtype=SAMPLE_DTYPE)
        sizes = self._sizes[hashes(np.uint64(1), ids) % np.uint64(len(self._sizes))]
        rows["height"], rows["width"] = sizes.T
        rows["offset"], rows["nbytes"] = 10_240 * (ids % 10_000), 10_240
        rows["format"] = ImageFormat.JPEG
        return rows


def web_config(views: int = 1) -> DataConfig:
    """Return the shipped recipe; several views are crops."""
    return DataConfig(
        token_budget=4096,
        max_images_per_pack=192,
        resolution=ResolutionConfig("side", 64, 256),
        drop=DropConfig("resolution", min=0.1, max=0.9),
        augment=AugmentConfig(flip=views > 1, crop_min_area=0.4 if views > 1 else 1),
        views=views,
        patch_size=16,
        cost_dim=768,
    )


def web_plan(samples: int, shards: int, packs: int, views: int = 1) -> Plan:
    """Return the plan of `samples` in `shards` equal shards; their masses are not counted."""
    rows, count = ComputedRows(samples), samples // shards
    listed = tuple(
        Shard(f"s3://bucket/{i:06d}.tar", 10**9, 0, i * count, count) for i in range(shards)
    )
    manifest = Manifest(listed, rows, None, "computed")
    tokens = np.full(shards, 100.0 * count)
    none = np.zeros(shards)
    masses = ShardMasses(tokens, np.full(shards, float(count)), none, none, none)
    with patch.object(data_pipeline.plan.plan, "shard_masses", lambda *_, **__: masses):
        return Plan(manifest, web_config(views), packs)


def measure_start(folder: Path, samples: int, shards: int, ranks: int) -> dict[str, float]:
    """Write an index of shards that do not exist, and open it as each rank does."""
    write_empty_index(folder, samples, shards)
    with measured() as found:
        manifest = Manifest.open(folder, Share(0, ranks))
    assert len(manifest.samples) == samples
    assert len(manifest.shards) == shards
    return {"samples": samples, "open_s": found["seconds"], "open_mib": found["mib"]}


def measure_count(samples: int, shards: int, packs: int) -> dict[str, float]:
    """Count some shards as the first plan of a run counts all."""
    some = min(shards, max(1, shards * 1_500_000 // samples))  # too few for the cache on disk
    plan = web_plan(some * (samples // shards), some, min(packs, some))
    manifest = replace(plan.manifest, samples=plan.manifest.samples[:])
    with measured() as found:
        usable = Plan(manifest, plan.config, plan.num_lanes).num_images
    return {
        "samples_a_s": usable / found["seconds"],
        "all_s": samples * found["seconds"] / usable,
        "cached_mib": 5 * 8 * shards / 2**20,
    }


def measure_index(folder: Path, samples: int, shards: int) -> dict[str, float]:
    """Index one shard of small images; an index pass reads headers alone, whatever their size."""
    count = min(10_000, samples // shards)
    image, cls = encode(photograph(64, 64)), b"0"
    members = [
        (f"{n:06d}.{s}", data) for n in range(count) for s, data in (("jpg", image), ("cls", cls))
    ]
    write_shard(folder / "0.tar", members)
    with measured() as found:
        index_shards(folder)
    seconds = found["seconds"] / count
    return {"samples_a_s": 1 / seconds, "core_hours_for_all": samples * seconds / 3600}


def write_empty_index(folder: Path, samples: int, shards: int) -> None:
    """Write empty tar files, and an index that says they hold `samples` images without a size."""
    count = samples // shards
    empty, known = np.zeros(count, SAMPLE_DTYPE), np.zeros(count, CHECKSUM_DTYPE)
    digest, checksums = hashlib.sha256(empty.tobytes()).hexdigest(), rows_digest(empty, known)
    entries = []
    for number in range(shards):
        name = f"{number:06d}.tar"
        (folder / name).touch()
        mtime = (folder / name).stat().st_mtime_ns
        entries.append(
            ShardEntry(
                *(name, 0, mtime, count, 0, 3, digest, "", {}), reader=READER, checksums=checksums
            )
        )
    small = [np.zeros(0, dtype) for dtype in (SAMPLE_DTYPE, CHECKSUM_DTYPE)]
    write_entries(folder, FolderIndex(entries, *small), [])
    for kind, dtype in (("manifest", SAMPLE_DTYPE), ("checksums", CHECKSUM_DTYPE)):
        # Written by seeking to its end, so that the file takes no room.
        (array,) = folder.glob(f"{kind}-*.npy")
        np.lib.format.open_memmap(array, "w+", dtype, (samples,)).flush()


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Fill a dict with the CPU seconds of the block, and the MiB by which memory has grown."""
    found: dict[str, float] = {}
    before, start = resident_mib(), time.process_time()
    yield found
    found["seconds"] = time.process_time() - start
    found["mib"] = resident_mib() - before


def resident_mib() -> float:
    """Return the memory of this process that no file backs, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def measure_rank(samples: int, shards: int, ranks: int, packs: int, views: int) -> dict[str, float]:
    """Plan and restore as one rank does."""
    with measured() as made:
        plan = web_plan(samples, shards, packs, views)
    lanes = [lane for lane in lanes_of_rank(0, ranks, packs) if lane < packs]
    with measured() as first:
        packers = {lane: plan.lane(lane) for lane in lanes}
        planned = [packer.next_pack() for packer in packers.values()]
        for pack in planned:
            pack_recipe(plan, pack, 0)
    with measured() as steady:
        images = 0
        for _ in range(100):
            for packer in packers.values():
                pack = packer.next_pack()
                assert pack is not None
                pack_recipe(plan, pack, 0)
                images += len(pack.lengths)
    state = merged_state(plan, packers, packs)
    text = json.dumps(state)
    with measured() as restored:
        saved = json.loads(text)
        for lane in lanes:
            plan.lane(lane, LaneState.from_json(saved["lanes"][str(lane)])).next_pack()
    return {
        "plan_s": made["seconds"],
        "plan_mib": made["mib"],
        "first_step_s": first["seconds"],
        "plan_us_an_image": 1e6 * steady["seconds"] / images,
        "lanes_mib": first["mib"] + steady["mib"],
        "state_bytes": len(text),
        "state_bytes_a_lane": len(text) / packs,
        "restore_s": restored["seconds"],
    }


def merged_state(plan: Plan, packers: dict[int, Any], packs: int) -> dict[str, Any]:
    """Return the data state of a checkpoint, in which all lanes are like those of this rank."""
    own = [packer.state.to_json() for packer in packers.values()]
    lanes = {str(lane): own[lane % len(own)] for lane in range(packs)}
    lanes |= {str(lane): state for lane, state in zip(packers, own, strict=True)}
    return {"fingerprint": "0" * 64, "num_lanes": packs, "step": 100, "lanes": lanes}


def balance(plan: Plan, lanes: range, steps: int, ranks: int) -> dict[str, float]:
    """Return the fill of the packs, and the largest cost of a rank / the mean, over the steps."""
    costs, tokens, images = np.zeros((steps, len(lanes))), 0, 0
    with measured() as found:
        for column, lane in enumerate(lanes):
            packer = plan.lane(lane)
            for step in range(steps):
                pack = packer.next_pack()
                assert pack is not None
                costs[step, column] = image_costs(pack.lengths, plan.cost_dim).sum()
                tokens, images = tokens + int(pack.lengths.sum()), images + len(pack.lengths)
    of_ranks = np.stack([costs[:, rank::ranks].sum(axis=1) for rank in range(ranks)], axis=1)
    ratios = of_ranks.max(axis=1) / of_ranks.mean(axis=1)
    return {
        "steps": steps,
        "ranks": ranks,
        "images": images,
        "fill": tokens / (costs.size * plan.limits.token_budget),
        "straggler_mean": float(ratios.mean()),
        "straggler_p99": float(np.quantile(ratios, 0.99)),
        "seconds": found["seconds"],
    }


if __name__ == "__main__":
    main()
