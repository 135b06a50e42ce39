"""The record of samples: those that each step trained on, and those that could not be used."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from zeta.config_field import check_range, free
from zeta.distributed import World
from zeta.exit_codes import RunError
from zeta.packed import PackedBatch, Rejected, StepPacks, id_digest
from zeta.run.directory import RunDir
from zeta.run.jsonl import JsonlFile, cut_after


@dataclass
class QuarantineConfig:
    """Limits on unusable images, beyond which the run ends with exit code 93."""

    max_share: float = free(0.05)
    """Largest share of unusable images, checked once `probation_images` were seen."""
    probation_images: int = free(10_000)
    """Number of images before the share is checked."""
    max_in_a_row: int = free(100)
    """Largest number of unusable images in a row in one lane; more of them point to faulty storage
    or to shards of another kind, not to bad images."""

    def __post_init__(self) -> None:
        check_range("train.quarantine.max_share", self.max_share, 0, 1)
        check_range("train.quarantine.probation_images", self.probation_images, 0)
        check_range("train.quarantine.max_in_a_row", self.max_in_a_row, 1)


class Ledger:
    """The file `ledger/rank_XXXXX.jsonl`: one line a step with the samples of this rank.

    A line has `step` (committed steps, this one included), `epoch`, `images`, `tokens`, `lanes`
    (lane: [images, digest of their sample ids in order]) and `rejected` ids. If samples have
    several views, each view is an image, so its sample id is there once for every view, and
    `samples` is the number of samples. A step that was skipped because its loss or gradient was not
    finite also lists all its `sample_ids`. `max_epochs` is present if the run had one, because the
    last packs depend on it.
    """

    def __init__(
        self,
        run_dir: RunDir,
        rank: int,
        resume_step: int,
        world_size: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        """Open this rank's file to continue after `resume_step`.

        If `world_size` is given, rank 0 also cuts the files of ranks that no longer exist.
        """
        self._limit = {} if max_epochs is None else {"max_epochs": max_epochs}
        if rank == 0 and world_size is not None:
            for path in sorted(run_dir.ledger.glob("rank_*.jsonl")):
                number = path.stem.removeprefix("rank_")
                if number.isdecimal() and int(number) >= world_size:
                    cut_after(path, resume_step)
        self._file = JsonlFile(run_dir.ledger / f"rank_{rank:05d}.jsonl", resume_step)

    def write(self, step: int, packs: StepPacks, skipped: bool) -> None:
        """Record the samples of one step.

        Args:
            step: committed steps, this one included.
            packs: this rank's packs.
            skipped: whether the step was skipped, and so changed nothing.
        """
        ids = [used_sample_ids(pack) for pack in packs.packs]
        line: dict[str, object] = {
            "step": step,
            "epoch": packs.epoch,
            "images": packs.num_images,
            "tokens": packs.num_tokens,
            "lanes": {
                lane: [len(i), id_digest(i)] for lane, i in zip(packs.lanes, ids, strict=True) if i
            },
            "rejected": [rejected.sample_id for rejected in packs.rejected],
            **self._limit,
        }
        if any(pack.view_of is not None for pack in packs.packs):
            line["samples"] = sum(len(used_samples(pack)) for pack in packs.packs)
        if skipped:
            samples = [i for pack in packs.packs for i in used_samples(pack)]
            line |= {"skipped": True, "sample_ids": samples}
        self._file.write(line)
        if skipped:
            with suppress(OSError):  # a full disk: the line is written later
                self._file.flush()

    def flush(self) -> None:
        """Bring every line to the disk, or raise OSError; called before a checkpoint."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        with suppress(OSError):  # the lines lost here are of steps after the last checkpoint
            self._file.close()


class Quarantine:
    """The file `quarantine.jsonl`: one line for every unusable sample, with the reason."""

    def __init__(self, path: Path, world: World) -> None:
        self._path = path
        self._world = world
        self._known: set[int] = set()
        self._unwritten = bytearray()
        """Lines that are not in the file yet, for example on a full disk."""
        self._on_disk = True
        if world.is_main and path.exists():
            content = path.read_text(errors="replace")
            whole = [line for line in content.splitlines() if line.endswith("}")]
            self._known = {known for line in whole if (known := _sample_of(line)) is not None}
            if content and not content.endswith("\n"):
                self._unwritten += b"\n"  # after a line that a kill cut off

    @property
    def count(self) -> int:
        """Number of different samples quarantined so far (known to rank 0 only)."""
        return len(self._known)

    def add(self, step: int, rejected: Sequence[Rejected], in_a_row: int) -> QuarantineNews:
        """Add the samples that this rank rejected; called by all ranks, written by rank 0.

        A sample is listed once, even if it is rejected again in another epoch or a replay.
        `in_a_row` is the largest number of rejected images in a row in a lane of this rank.

        Returns:
            A summary over all ranks, the same on each.
        """
        everything = self._world.gather((in_a_row, [asdict(item) for item in rejected]))
        items = [item for _, of_rank in everything for item in of_rank]
        if self._world.is_main:
            for item in items:
                if item["sample_id"] not in self._known:
                    self._known.add(item["sample_id"])
                    self._unwritten += (json.dumps({"step": step, **item}) + "\n").encode()
                    self._on_disk = False
            with suppress(OSError):  # a full disk: the lines are written later
                self._append()
        last = items[-1]
        return QuarantineNews(
            max(longest for longest, _ in everything),
            f"{last['key']} in {last['shard']}: {last['reason']}",
        )

    def flush(self) -> None:
        """Bring every line to the disk, or raise OSError; called before a checkpoint."""
        if not self._on_disk:
            self._append(durable=True)
            self._on_disk = True

    def _append(self, *, durable: bool = False) -> None:
        with self._path.open("ab", buffering=0) as file:
            while self._unwritten:
                del self._unwritten[: file.write(self._unwritten)]
            if durable:
                os.fsync(file.fileno())


def _sample_of(line: str) -> int | None:
    """Return the sample of a line of the quarantine; None for a damaged line, which stays there."""
    try:
        sample = json.loads(line)["sample_id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return sample if isinstance(sample, int) else None


class QuarantineNews(NamedTuple):
    """Summary over all ranks of a step with rejected samples."""

    in_a_row: int
    """Largest number of rejected images in a row in a lane, this step included."""
    last: str
    """Key, shard and reason of the last rejected image."""


class Streaks:
    """Counter of the rejected samples in a row, for each lane of this rank."""

    def __init__(self) -> None:
        self._lanes: dict[int, int] = {}

    def update(self, packs: StepPacks) -> int:
        """Count the images of one step; return its largest number of rejected images in a row."""
        longest = 0
        for lane, pack in zip(packs.lanes, packs.packs, strict=True):
            run = self._lanes.get(lane, 0)
            for weight in pack.weights[pack.first_views].tolist():
                run = 0 if weight > 0 else run + 1
                longest = max(longest, run)
            self._lanes[lane] = run
        return longest


def check_budgets(
    limits: QuarantineConfig, news: QuarantineNews, *, images: int, rejected: int
) -> None:
    """Raise RunError if more images were rejected than a healthy data set has.

    Args:
        limits: the budgets.
        news: summary of the last step that rejected an image.
        images: number of images that the run has trained on.
        rejected: number of images that it could not use.
    """
    if news.in_a_row >= limits.max_in_a_row:
        raise RunError(
            f"{news.in_a_row} images in a row could not be used (train.quarantine.max_in_a_row), "
            f"the last was {news.last}. Look at quarantine.jsonl; `zeta shards verify` finds all "
            "bad images"
        )
    share = rejected / (images + rejected)
    if images + rejected >= limits.probation_images and share > limits.max_share:
        raise RunError(
            f"{rejected:,} of {images + rejected:,} images ({share:.1%}) could not be used, more "
            f"than train.quarantine.max_share = {limits.max_share:.1%}; the last was {news.last}. "
            "Look at quarantine.jsonl, and repair the shards or raise the limit"
        )


def used_sample_ids(pack: PackedBatch) -> list[int]:
    """Return the ids of the images of weight 1, in order; one for each view of a sample."""
    ids: list[int] = pack.sample_ids[pack.weights > 0].tolist()
    return ids


def used_samples(pack: PackedBatch) -> list[int]:
    """Return the ids of the samples of weight 1, in order; one whatever the number of views."""
    ids: list[int] = pack.sample_ids[(pack.weights > 0) & pack.first_views].tolist()
    return ids
