"""Verification of shards: compare checksums, decode every sample, and name every bad one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tqdm import tqdm

from data_pipeline.loading.decode import decode_image
from data_pipeline.shards.checksum import UNKNOWN, DamagedSample, checksum
from data_pipeline.shards.folder import ShardSpec, by_folder, folder_of, resolve_shards
from data_pipeline.shards.images.header import ImageError, image_size
from data_pipeline.shards.known_checksums import KnownChecksums, by_place, known_checksums
from data_pipeline.shards.manifest_files import MANIFEST_NAME, read_class_names
from data_pipeline.shards.parallel import run_tasks
from data_pipeline.shards.sample import Sample, SampleError
from data_pipeline.shards.tar_reader import Member, TarError, iter_samples, parse_sample
from data_pipeline.shards.unread import Unread, UnreadParts, joined, kind_of_entry

_MAX_SAMPLE_BYTES = 2**32 - 1


class BadSample(NamedTuple):
    """A sample that cannot be used, or a shard that is damaged from some byte on."""

    shard: str
    key: str
    """Key of the sample; "" if the shard itself is damaged."""
    reason: str


@dataclass(frozen=True)
class VerifyResult:
    """The result of `verify_shards`."""

    shards: int
    """Number of shards."""
    samples: int
    """Number of samples, bad ones included."""
    bad: tuple[BadSample, ...]
    """Bad samples, in order of shard and sample."""
    unchecked: int = 0
    """Number of samples whose bytes were compared with no checksum, as their index has none."""
    unread: tuple[Unread, ...] = ()
    """Entries and members that are not read, which may be meant so."""


def verify_shards(spec: ShardSpec, *, workers: int = 1, progress: bool = False) -> VerifyResult:
    """Decode every image in full and read every label and caption of the shards of `spec`.

    The index is neither needed nor trusted, but the bytes of a sample are compared with the
    checksum that it has for them. A damaged shard, or a damaged index, counts as one bad sample
    without a key, after the samples that precede the damage.

    Raises:
        ValueError: the spec matches no shard.
        OSError: a shard cannot be read at all.
    """
    shards = resolve_shards(spec)
    known, broken = _known_checksums(shards)
    tasks = [_Task(number, path, known.get(path)) for number, path in enumerate(shards)]
    found: dict[int, _Verified] = {}
    with tqdm(total=len(tasks), unit=" shards", desc="verify", disable=not progress) as bar:
        # Decoding takes long enough that processes always pay off.
        for verified in run_tasks(_verify_shard, tasks, workers, 2**62):
            found[verified.number] = verified
            bar.update()
    ordered = [found[number] for number in range(len(shards))]
    return VerifyResult(
        shards=len(shards),
        samples=sum(verified.samples for verified in ordered),
        bad=(*(line for verified in ordered for line in verified.bad), *broken),
        unchecked=sum(verified.unchecked for verified in ordered),
        unread=joined((verified.unread.counts, verified.unread.examples) for verified in ordered),
    )


@dataclass(frozen=True)
class _Task:
    number: int
    path: str
    known: KnownChecksums | None


def _known_checksums(
    shards: Sequence[str],
) -> tuple[dict[str, KnownChecksums], list[BadSample]]:
    """Return what the indexes know of each shard, and the indexes that are damaged."""
    known, broken = dict[str, KnownChecksums](), list[BadSample]()
    for folder, names in by_folder(shards).items():
        try:
            found = known_checksums(folder, names)
        except ValueError as error:
            broken.append(BadSample(str(folder.index / MANIFEST_NAME), "", str(error)))
            continue
        known |= {folder.shard(name): checksums for name, checksums in found.items()}
    return known, broken


@dataclass(frozen=True)
class _Verified:
    """The result for one shard."""

    number: int
    samples: int
    unchecked: int
    bad: list[BadSample]
    unread: UnreadParts


def _verify_shard(task: _Task) -> _Verified:
    torch.set_num_threads(1)
    path = task.path
    folder, name = folder_of(path)
    class_names = read_class_names(folder.index)
    samples, unchecked, bad, unread = 0, 0, list[BadSample](), UnreadParts()
    known = by_place(task.known)
    with folder.open(name) as shard:
        runs = iter_samples(shard.read_at, shard.nbytes, path)
        for key, first, last in _spans(runs, bad, unread, path):
            samples += 1
            if last - first > _MAX_SAMPLE_BYTES:
                bad.append(BadSample(path, key, f"sample of {last - first} bytes"))
                continue
            data = shard.read_at(first, last - first)
            expected = known.get((first, last - first), UNKNOWN)
            unchecked += expected == UNKNOWN
            if expected not in (UNKNOWN, checksum(data)):
                bad.append(BadSample(path, key, str(DamagedSample(first, len(data)))))
                continue
            bad += [
                BadSample(path, key, reason) for reason in _faults(data, path, first, class_names)
            ]
    bad = [line._replace(reason=unread.reason(line.key, line.reason)) for line in bad]
    return _Verified(task.number, samples, unchecked, bad, unread)


def _spans(
    runs: Iterator[tuple[str, list[Member]]],
    bad: list[BadSample],
    unread: UnreadParts,
    path: str,
) -> Iterator[tuple[str, int, int]]:
    """Yield key, first byte and end of each sample; damage goes into `bad` and ends it."""
    try:
        for key, members in runs:
            if not key:
                unread.note(kind_of_entry(members[0]), members[0].name)
            else:
                unread.note_sample(key, (member.name for member in members))
                suffixes = [member.name.rpartition("/")[2].partition(".")[2] for member in members]
                twice = sorted({s for s in suffixes if suffixes.count(s) > 1})
                if twice:
                    bad.append(BadSample(path, key, f"two members .{twice[0]} under one key"))
                yield key, members[0].offset, members[-1].end
    except TarError as error:
        bad.append(BadSample(path, "", f"{error.what} (at byte {error.offset})"))


def _faults(
    data: bytes, path: str, offset: int, class_names: Sequence[str] | None
) -> Iterator[str]:
    """Yield each fault of the sample in `data`."""
    sample = parse_sample(data, shard=path, offset=offset)
    checks: tuple[Callable[[], object], ...] = (
        lambda: _decode(sample),
        lambda: sample.labels(class_names),
        lambda: sample.caption,
    )
    for check in checks:
        try:
            check()
        except (SampleError, ImageError) as error:
            yield str(error)


def _decode(sample: Sample) -> None:
    header = image_size(sample.image)
    decode_image(sample.image, height=header.height, width=header.width)
