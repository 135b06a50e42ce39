"""The account of samples: what each step trained on, and what could not be used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from zeta.distributed import World
from zeta.packed import PackedBatch, Rejected, StepPacks
from zeta.run_dir import RunDir
from zeta.sinks import JsonlFile


class Ledger:
    """`ledger/rank_XXXXX.jsonl`: one line a step of the samples that this rank trained on.

    A line has `step` (committed steps, this one included), `epoch`, `images`, `tokens`, `lanes`
    (lane: [images, digest of their ids in order]) and `rejected` ids. A step that was skipped
    because its loss or gradient was not finite also lists all its `sample_ids`.
    """

    def __init__(self, run_dir: RunDir, rank: int, resume_step: int) -> None:
        self._file = JsonlFile(run_dir.ledger / f"rank_{rank:05d}.jsonl", resume_step)

    def write(self, step: int, packs: StepPacks, lanes: Sequence[int], skipped: bool) -> None:
        """Note the samples of one step.

        Args:
            lanes: lane of each pack.
            skipped: the step changed nothing.
        """
        ids = [used_sample_ids(pack) for pack in packs.packs]
        line: dict[str, object] = {
            "step": step,
            "epoch": packs.epoch,
            "images": packs.num_images,
            "tokens": packs.num_tokens,
            "lanes": {
                lane: [len(i), id_digest(i)] for lane, i in zip(lanes, ids, strict=True) if i
            },
            "rejected": [rejected.sample_id for rejected in packs.rejected],
        }
        if skipped:
            line |= {"skipped": True, "sample_ids": [i for pack_ids in ids for i in pack_ids]}
        self._file.write(line)
        if skipped:
            self._file.flush()

    def flush(self) -> None:
        """Bring every line to the disk; called before a checkpoint."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


class Quarantine:
    """`quarantine.jsonl`: one line for every sample that could not be used, with the reason."""

    def __init__(self, path: Path, world: World) -> None:
        self._path = path
        self._world = world
        self._known: set[int] = set()
        if world.is_main and path.exists():
            lines = path.read_text().splitlines()
            self._known = {json.loads(line)["sample_id"] for line in lines if line.endswith("}")}

    @property
    def count(self) -> int:
        """Different samples quarantined so far (known to rank 0 only)."""
        return len(self._known)

    def add(self, step: int, rejected: Sequence[Rejected]) -> None:
        """Add the samples that this rank rejected; called by all ranks, written by rank 0.

        A sample is listed once, however often it comes up (each epoch, each replay).
        """
        everything = self._world.gather([asdict(item) for item in rejected])
        if not self._world.is_main:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for item in (item for of_rank in everything for item in of_rank):
                if item["sample_id"] not in self._known:
                    self._known.add(item["sample_id"])
                    file.write(json.dumps({"step": step, **item}) + "\n")


def used_sample_ids(pack: PackedBatch) -> list[int]:
    """Return the ids of the images of weight 1, in order."""
    ids: list[int] = pack.sample_ids[pack.weights > 0].tolist()
    return ids


def id_digest(ids: Sequence[int]) -> str:
    """Return a short digest of sample ids in order."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]
