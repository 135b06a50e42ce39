"""The index files of a folder of shards, and their formats.

``manifest.json`` lists the shards with their sizes, mtimes and digests, and names the array of
their samples, ``manifest-DIGEST.npy``, by its content: replacing the JSON replaces both at once.
``checksums-DIGEST.npy`` has a checksum for each sample, if the index pass read all their bytes.
``manifest_rejected.jsonl`` has one line for each sample that cannot be trained on.
``classes.json`` is the class map, a JSON list of names, written by the builder or by the user.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import IntFlag
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from data_pipeline.shards.atomic_file import write_atomically
from data_pipeline.shards.checksum import CHECKSUM_DTYPE, UNKNOWN, rows_digest
from data_pipeline.shards.sample_rows import release_pages
from zeta.files import as_record, read_json, read_json_lines

MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "manifest_rejected.jsonl"
CLASSES_NAME = "classes.json"
_MAX_JSON = 2**30
_RELEASED_ROWS = 2**20
"""Rows that are compared before their memory is released."""
VERSION = 1
READER = 2
"""Version of the code that reads samples. Reader 1 took lists of labels for errors, and read
captions in ``.txt`` only."""

SAMPLE_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # byte of the sample's first tar header in its shard
        ("nbytes", "<u4"),  # of all its members, headers and padding included
        ("height", "<u2"),  # pixels, after EXIF orientation
        ("width", "<u2"),  # pixels, after EXIF orientation
        ("label", "<i4"),  # class index, -1 without one
        ("format", "u1"),  # data_pipeline.shards.images.header.ImageFormat
        ("flags", "u1"),  # SampleFlag
        ("reserved", "<u2"),
    ]
)


class SampleFlag(IntFlag):
    """The bits of the ``flags`` column."""

    BAD = 1
    """The sample cannot be trained on; its reason is in the rejected list."""
    LABELLED = 2
    """The sample has a class label, or a list of labels, which may be empty."""
    CAPTIONED = 4
    """The sample has a caption: a ``.txt`` that is not empty, or ``caption`` in ``.json``."""


@dataclass(frozen=True)
class ShardEntry:
    """The entry of a shard in ``manifest.json``; rows are in the order of the entries."""

    name: str
    nbytes: int
    mtime_ns: int
    count: int
    """Number of samples."""
    bad: int
    """Number of samples flagged as bad."""
    highest_label: int
    """Largest class index; -1 without labels."""
    digest: str
    """SHA-256 of its rows."""
    classes: str
    """Digest of the class map used to read its labels."""
    ignored: dict[str, int]
    """Number of tar entries that belong to no sample, and of members that are not read, by kind."""
    label_lists: int = 0
    """Number of samples with several labels, or with an empty list."""
    most_labels: int = 1
    """Largest number of labels of a sample."""
    reader: int = 1
    """Version of the reader of its samples; see `READER`."""
    checksums: str = ""
    """XXH3-128 of its rows and of the checksums of its samples; "" without checksums."""
    ignored_examples: dict[str, str] = field(default_factory=dict)
    """Name of the first entry or member of each kind in `ignored`."""


@dataclass(frozen=True)
class RejectedLine:
    """One line of the rejected list."""

    shard: str
    """File name of the shard."""
    row: int
    """Index of the sample in its shard."""
    key: str
    reason: str


Item = TypeVar("Item")
_CHECKED_BY_EVERY_RANK = 64
"""Number of shards of a folder that a rank compares at least, so that every node looks at some."""


class Share(NamedTuple):
    """The part of the shards that a rank compares with their index; all ranks compare all."""

    rank: int = 0
    world_size: int = 1

    def of(self, names: Sequence[Item]) -> Sequence[Item]:
        """Return the names of this rank: all, if that is little work."""
        step = max(1, min(self.world_size, len(names) // _CHECKED_BY_EVERY_RANK))
        return names[self.rank % step :: step]


ALL_SHARDS = Share()


class FolderIndex(NamedTuple):
    """The index of a folder."""

    entries: list[ShardEntry]
    samples: np.ndarray
    """Rows [N] of `SAMPLE_DTYPE` of all entries in order, memory-mapped."""
    checksums: np.ndarray
    """Checksums [N] of `CHECKSUM_DTYPE`, memory-mapped; `UNKNOWN` where there are none."""

    def slices(self) -> dict[str, slice]:
        """Return the run of rows of each shard, by its name."""
        ends = np.cumsum([entry.count for entry in self.entries]).tolist()
        return {
            entry.name: slice(end - entry.count, end)
            for entry, end in zip(self.entries, ends, strict=True)
        }


def read_entries(folder: Path, share: Share = ALL_SHARDS) -> FolderIndex | None:
    """Return the index of a folder, its rows and checksums compared with their digests.

    Those of `share` are compared. Return None without an index, or for an index of another version.

    Raises:
        ValueError: the index is damaged.
    """
    path, what = folder / MANIFEST_NAME, f"delete it and type `zeta shards index {folder}`"
    try:
        content = read_json(path, limit=_MAX_JSON, what=what)
    except FileNotFoundError:
        return None
    try:
        if content["version"] != VERSION:
            return None
        listed = content["shards"]
        if not isinstance(listed, list):
            raise ValueError("it lists no shards")
        samples = _mapped(folder, content["samples"], "manifest", SAMPLE_DTYPE)
        checksums = np.broadcast_to(CHECKSUM_DTYPE.type(UNKNOWN), samples.shape)
        if content.get("checksums") is not None:
            checksums = _mapped(folder, content["checksums"], "checksums", CHECKSUM_DTYPE)
    except Exception as error:  # damaged arrays raise errors of many kinds
        raise ValueError(f"{path} is damaged ({error}); {what}") from error
    entries = [
        as_record(ShardEntry, entry, place=f"{path} shard {number}", what=what)
        for number, entry in enumerate(listed)
    ]
    fault = _fault(entries, samples, checksums, content, share)
    if fault:
        raise ValueError(f"{path} is damaged ({fault}); {what}")
    return FolderIndex(entries, samples, checksums)


def _mapped(folder: Path, name: Any, kind: str, dtype: np.dtype[Any]) -> np.ndarray:
    """Return the array of an index; an error of any kind if it is not one of `dtype`."""
    if not re.fullmatch(rf"{kind}-[0-9a-f]{{16}}\.npy", name):
        raise ValueError("it names no array beside it")
    array: np.ndarray = np.load(folder / name, mmap_mode="r", allow_pickle=False)
    if array.dtype != dtype or array.ndim != 1:
        raise ValueError(f"{name} holds no {kind}")
    return array


def _fault(
    entries: list[ShardEntry],
    samples: np.ndarray,
    checksums: np.ndarray,
    content: dict[str, Any],
    share: Share,
) -> str:
    """Return how an index differs from the digests in it; "" if it does not."""
    digest = content.get("digest")  # older ones have none
    if digest is not None and digest != sha256(json.dumps(content["shards"])):
        return "its list of shards is not the one written"
    first, compared = 0, set(share.of(range(len(entries))))
    for number, entry in enumerate(entries):
        if not 0 <= entry.count <= min(len(samples), len(checksums)) - first:
            return "the arrays do not match the list"
        if number not in compared:
            first += entry.count
            continue
        place = slice(first, first + entry.count)
        rows, known = samples[place], checksums[place]
        if entry.checksums:  # the fast one; those of SHA-256 are in the name of the array
            whole = rows_digest(rows, known) == entry.checksums
        else:
            whole = hashlib.sha256(rows.view(np.uint8).data).hexdigest() == entry.digest
            whole = whole and not known.any()
        if not whole:
            return f"the rows of {entry.name} in {content['samples']} are not those written"
        if first // _RELEASED_ROWS != (first + entry.count) // _RELEASED_ROWS:
            release_pages(samples)
            release_pages(checksums)
        first += entry.count
    if first != len(samples) or first != len(checksums):
        return "the arrays do not match the list"
    if content["samples"] != _array_name("manifest", [entry.digest for entry in entries]):
        return "the digests of its shards are not those written"
    return ""


def write_entries(folder: Path, index: FolderIndex, rejected: list[RejectedLine]) -> None:
    """Replace the index of a folder in one step: a reader sees the old one or the new one."""
    entries = index.entries
    content: dict[str, Any] = {
        "version": VERSION,
        "samples": _array_name("manifest", [entry.digest for entry in entries]),
    }
    arrays = {content["samples"]: index.samples}
    if any(entry.checksums for entry in entries):
        content["checksums"] = _array_name("checksums", [entry.checksums for entry in entries])
        arrays[content["checksums"]] = index.checksums
    for name, array in arrays.items():
        with write_atomically(folder / name) as stream:
            np.save(stream, array)
    with write_atomically(folder / REJECTED_NAME) as stream:
        for line in rejected:
            stream.write(json.dumps(asdict(line)).encode() + b"\n")
    content["shards"] = [asdict(entry) for entry in entries]
    content["digest"] = sha256(json.dumps(content["shards"]))
    with write_atomically(folder / MANIFEST_NAME) as stream:
        stream.write(json.dumps(content, indent=1).encode())
    for old in (*folder.glob("manifest-*.npy"), *folder.glob("checksums-*.npy")):
        if old.name not in arrays:
            old.unlink(missing_ok=True)


def _array_name(kind: str, digests: list[str]) -> str:
    return f"{kind}-{sha256(''.join(digests))[:16]}.npy"


def read_rejected(folder: Path) -> dict[str, list[RejectedLine]]:
    """Return the lines of the rejected list of a folder, by name of shard."""
    lines: dict[str, list[RejectedLine]] = {}
    path, what = (
        folder / REJECTED_NAME,
        f"delete manifest.json and type `zeta shards index {folder}`",
    )
    try:
        for place, record in read_json_lines(path, limit=_MAX_JSON, what=what):
            line = as_record(RejectedLine, record, place=place, what=what)
            lines.setdefault(line.shard, []).append(line)
    except FileNotFoundError:
        return lines
    return lines


def read_class_names(folder: Path) -> tuple[str, ...] | None:
    """Return the class map of a folder, or None without one; ValueError if it is malformed."""
    try:
        what = "write a JSON list of class names"
        names = read_json(folder / CLASSES_NAME, limit=_MAX_JSON, what=what)
    except FileNotFoundError:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{folder / CLASSES_NAME} must be a JSON list of class names")
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"{folder / CLASSES_NAME} is empty or names a class twice")
    return tuple(names)


def write_class_names(folder: Path, class_names: tuple[str, ...]) -> None:
    """Write the class map of a folder, one name per line."""
    with write_atomically(folder / CLASSES_NAME) as stream:
        stream.write(json.dumps(class_names, ensure_ascii=False, indent=0).encode())


def classes_digest(class_names: tuple[str, ...] | None) -> str:
    """Return the digest of a class map; "" for None."""
    return "" if class_names is None else sha256(json.dumps(class_names))


def sha256(text: str) -> str:
    """Return the hexadecimal SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
