"""Which samples of a source are held out: all of a picture's, or none."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from data_pipeline.shards.sample import SampleError, pick_image
from data_pipeline.shards.sources.sample import FilePart, Source, SourceSample

_END_BYTES = 4096


def split_source(source: Source, val_share: float) -> dict[str, Source]:
    """Return the samples to train on (`train`) and those to hold out (`val`).

    Samples with the same picture (rows of a table that name one file, or files with equal bytes)
    fall on one side, by a hash of the first of their keys: otherwise a held-out picture would be
    trained on as well.

    Raises:
        ValueError: there are fewer than two pictures.
    """
    groups = _groups(source.samples)
    if len(groups) < 2:
        what = "one image" if len(source.samples) == 1 else "one image, in several samples"
        raise ValueError(f"the source holds {what}, so none can be held out: add more images")
    share_of = {first: _hash_share(first) for first in groups}
    low, high = min(share_of, key=share_of.__getitem__), max(share_of, key=share_of.__getitem__)
    firsts = {key for key, share in share_of.items() if share < val_share} - {high} | {low}
    val = {key for first in firsts for key in groups[first]}
    train = [sample for sample in source.samples if sample.key not in val]
    held_out = [sample for sample in source.samples if sample.key in val]
    return {
        "train": replace(source, samples=train),
        "val": replace(source, samples=held_out, skipped=Counter()),
    }


def _groups(samples: Sequence[SourceSample]) -> dict[str, list[str]]:
    """Return the keys of the samples of each picture, by the first of them in order of text.

    Most files differ in size, or in their first or last bytes: only the others are read in full.
    """
    parts = [_image(sample) for sample in samples]
    marks: list[Hashable] = [
        ("no image", number) if part is None else _size(part) for number, part in enumerate(parts)
    ]
    for ends_only in (True, False):
        marks = _refined(parts, marks, ends_only)
    by_picture: dict[Hashable, list[str]] = defaultdict(list)
    for sample, mark in zip(samples, marks, strict=True):
        by_picture[mark].append(sample.key)
    return {min(keys): keys for keys in by_picture.values()}


def _refined(
    parts: Sequence[FilePart | bytes | None], marks: Sequence[Hashable], ends_only: bool
) -> list[Hashable]:
    """Return the marks with a digest added where several parts have the same."""
    alike: dict[Hashable, set[FilePart | bytes | None]] = defaultdict(set)
    for part, mark in zip(parts, marks, strict=True):
        alike[mark].add(part)
    digests: dict[FilePart | bytes, bytes] = {}
    refined = list(marks)
    for number, (part, mark) in enumerate(zip(parts, marks, strict=True)):
        if part is None or len(alike[mark]) == 1:
            continue
        if part not in digests:
            digests[part] = _digest(part, ends_only)
        refined[number] = mark, digests[part]
    return refined


def _image(sample: SourceSample) -> FilePart | bytes | None:
    try:
        return sample.members[pick_image(sample.members)]
    except SampleError:
        return None


def _size(part: FilePart | bytes) -> int:
    return len(part) if isinstance(part, bytes) else part.nbytes


def _digest(part: FilePart | bytes, ends_only: bool) -> bytes:
    """Return a digest of the bytes of a part, or of its first and last bytes."""
    if isinstance(part, bytes):
        return hashlib.blake2b(part, digest_size=16).digest()
    digest = hashlib.blake2b(digest_size=16)
    try:
        with Path(part.path).open("rb") as stream:
            for start, count in _ranges(part.nbytes, ends_only):
                stream.seek(part.offset + start)
                digest.update(stream.read(count))
    except OSError:  # the build names the file when it reads it
        return part.path.encode("utf-8", "surrogateescape")
    return digest.digest()


def _ranges(nbytes: int, ends_only: bool) -> Iterator[tuple[int, int]]:
    if not ends_only or nbytes <= 2 * _END_BYTES:
        yield 0, nbytes
        return
    yield 0, _END_BYTES
    yield nbytes - _END_BYTES, _END_BYTES


def _hash_share(key: str) -> float:
    """Return a number in [0, 1) that depends on the key alone."""
    digest = hashlib.blake2b(key.encode(), person=b"zeta val", digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
