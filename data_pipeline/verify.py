"""Verification of shards: every sample is read and decoded in full, and every bad one named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tqdm import tqdm

from data_pipeline.loading.decode import decode_image
from data_pipeline.shards.folder import ShardSpec, folder_of, resolve_shards
from data_pipeline.shards.image_header import ImageError, image_size
from data_pipeline.shards.manifest_files import read_class_names
from data_pipeline.shards.parallel import run_tasks
from data_pipeline.shards.sample import Sample, SampleError
from data_pipeline.shards.tar_reader import Member, TarError, iter_samples, parse_sample

_MAX_SAMPLE_BYTES = 2**32 - 1


class BadSample(NamedTuple):
    """A sample, or a whole shard from some byte on, that cannot be used."""

    shard: str
    key: str
    """"" where the shard itself is damaged."""
    reason: str


@dataclass(frozen=True)
class VerifyResult:
    """What `verify_shards` finds."""

    shards: int
    samples: int
    bad: tuple[BadSample, ...]
    """In order of shard and sample."""


def verify_shards(spec: ShardSpec, *, workers: int = 1, progress: bool = False) -> VerifyResult:
    """Decode every image in full and read every label and caption of the shards of `spec`.

    No index is needed and none is believed. A damaged shard counts as one bad sample without a
    key, after the samples before the damage.

    Raises:
        ValueError: the spec names nothing.
        OSError: a shard cannot be read at all.
    """
    shards = resolve_shards(spec)
    tasks = list(enumerate(shards))
    found: dict[int, tuple[int, list[BadSample]]] = {}
    with tqdm(total=len(tasks), unit=" shards", desc="verify", disable=not progress) as bar:
        # Decoding takes long enough that processes always pay.
        for number, samples, bad in run_tasks(_verify_shard, tasks, workers, nbytes=2**62):
            found[number] = samples, bad
            bar.update()
    return VerifyResult(
        shards=len(shards),
        samples=sum(samples for samples, _ in found.values()),
        bad=tuple(line for number in range(len(shards)) for line in found[number][1]),
    )


def _verify_shard(task: tuple[int, str]) -> tuple[int, int, list[BadSample]]:
    torch.set_num_threads(1)
    number, path = task
    folder, name = folder_of(path)
    class_names = read_class_names(folder.index)
    samples, bad = 0, list[BadSample]()
    with folder.open(name) as shard:
        runs = iter_samples(shard.read_at, shard.nbytes, path)
        for key, first, last in _spans(runs, bad, path):
            samples += 1
            if last - first > _MAX_SAMPLE_BYTES:
                bad.append(BadSample(path, key, f"sample of {last - first} bytes"))
                continue
            data = shard.read_at(first, last - first)
            bad += [
                BadSample(path, key, reason) for reason in _faults(data, path, first, class_names)
            ]
    return number, samples, bad


def _spans(
    runs: Iterator[tuple[str, list[Member]]], bad: list[BadSample], path: str
) -> Iterator[tuple[str, int, int]]:
    """Yield key, first byte and end of each sample, up to a damage, which goes into `bad`."""
    try:
        for key, members in runs:
            if key:
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
    """Yield what is wrong with the sample in `data`."""
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
