"""The manifest: the place of every sample of a set of shards, and the size of its image.

It has 24 bytes a sample, memory-mapped, so that order, sizes and packs are planned before any image
is read, and a checksum of 4. `data_pipeline.shards.index` writes it beside the shards;
`Manifest.open` checks it against them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_pipeline.shards.checksum import CHECKSUM_DTYPE, UNKNOWN
from data_pipeline.shards.folder import (
    ShardFolder,
    by_folder,
    folder_of,
    remote_pattern,
    resolve_shards,
    spec_parts,
)
from data_pipeline.shards.folder import ShardSpec as ShardSpec
from data_pipeline.shards.images.header import ImageFormat as ImageFormat
from data_pipeline.shards.manifest_files import ALL_SHARDS as ALL_SHARDS
from data_pipeline.shards.manifest_files import (
    CLASSES_NAME,
    READER,
    REJECTED_NAME,
    RejectedLine,
    ShardEntry,
    classes_digest,
    read_class_names,
    read_entries,
    read_rejected,
)
from data_pipeline.shards.manifest_files import SAMPLE_DTYPE as SAMPLE_DTYPE
from data_pipeline.shards.manifest_files import SampleFlag as SampleFlag
from data_pipeline.shards.manifest_files import Share as Share
from data_pipeline.shards.remote import is_remote
from data_pipeline.shards.retry import PermanentError
from data_pipeline.shards.sample_rows import SampleRows, join_rows
from data_pipeline.shards.unread import Unread, joined


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file, and its run of samples in the manifest."""

    path: str
    """Path or URL."""
    nbytes: int
    mtime_ns: int
    """Time of the last change in ns; for a remote shard, a hash of its ETag instead."""
    first: int
    """Id of its first sample."""
    count: int
    """Number of samples."""


@dataclass(frozen=True)
class WeightedSource:
    """A run of shards that is sampled at its own rate and has its own epochs."""

    name: str
    first_shard: int
    """Index of its first shard."""
    stop_shard: int
    """Index of its last shard, plus one."""
    weight: float


@dataclass(frozen=True)
class Rejection:
    """A sample that is flagged as bad, with the reason."""

    sample_id: int
    shard: str
    key: str
    reason: str


@dataclass(frozen=True, eq=False)
class Manifest:
    """The samples of the shards that a spec names; the id of a sample is its row.

    Ids depend on the spec and its order, and are the same wherever the spec is opened.
    """

    shards: tuple[Shard, ...]
    """Shards that hold samples."""
    samples: np.ndarray | SampleRows
    """Rows [N] of `SAMPLE_DTYPE`, memory-mapped if the shards of each folder are one run."""
    class_names: tuple[str, ...] | None
    fingerprint: str
    """SHA-256 of names, sizes, counts and row digests of the shards, and of the classes: equal for
    the same bytes, wherever and whenever they were copied."""
    highest_label: int = -1
    """Largest class index of any sample; -1 without labels."""
    label_lists: int = 0
    """Number of samples with several labels, or with an empty list."""
    most_labels: int = 1
    """Largest number of labels of a sample."""
    old_index: str | None = None
    """A folder whose index is older than the support for ``.json`` captions and lists of labels."""
    sources: tuple[WeightedSource, ...] = ()
    """Sources in order of their shards, if the spec gives weights."""
    unread: tuple[Unread, ...] = ()
    """Entries and members of the shards that are not read."""
    older_fingerprint: str = ""
    """The fingerprint as runs of earlier versions saved it, with mtimes."""
    checksums: np.ndarray | SampleRows | None = None
    """Checksum [N] of the bytes of each sample, memory-mapped; 0 where it is not known."""
    content_digest: str = ""
    """SHA-256 of what `fingerprint` covers and of all checksums; "" if a shard has none."""

    @staticmethod
    def open(spec: ShardSpec, share: Share = ALL_SHARDS) -> Manifest:
        """Open the index of the shards that `spec` names, and check it against them.

        A shard named twice counts once. `share` is the part of many shards that is compared: a
        question to the storage for each of them from thousands of ranks would take minutes, and so
        would reading all rows of the index. A shard that changes later is found when it is read.

        Raises:
            ValueError: shards are missing, were never indexed, changed since, or hold no usable
                image; the message has the command to type.
        """
        folders = [
            _open_folder(folder, names, share)
            for folder, names in by_folder(resolve_shards(spec)).items()
        ]
        for folder in folders:
            _refuse_missing(folder, spec)
            _refuse_other_classes(folder, folders[0])
        manifest = _concatenate(folders)
        bad = sum(entry.bad for folder in folders for entry in folder.entries)
        if bad == len(manifest.samples):
            raise ValueError(
                f"no usable image in the shards {_spelled(spec)}: "
                f"{_why_unusable(manifest, folders[0].path)}"
            )
        return manifest

    def shard_of(self, sample_ids: np.ndarray | int) -> np.ndarray:
        """Return the index in `shards` of each sample id; same shape as `sample_ids`."""
        return np.searchsorted(self._firsts, sample_ids, side="right") - 1

    @cached_property
    def _firsts(self) -> np.ndarray:
        return np.array([shard.first for shard in self.shards])

    @cached_property
    def known_checksums(self) -> np.ndarray | SampleRows:
        """Checksums [N]; zeros without memory of their own if there are none."""
        if self.checksums is not None:
            return self.checksums
        return np.broadcast_to(CHECKSUM_DTYPE.type(UNKNOWN), len(self.samples))

    def rejections(self) -> Iterator[Rejection]:
        """Yield the flagged samples of these shards with their reasons, in order of id."""
        lines: dict[ShardFolder, dict[str, list[RejectedLine]]] = {}
        for shard in self.shards:
            folder, name = folder_of(shard.path)
            if folder not in lines:
                lines[folder] = read_rejected(folder.index)
            for line in lines[folder].get(name, []):
                yield Rejection(shard.first + line.row, shard.path, line.key, line.reason)

    def reasons(self, most: int = 3) -> str:
        """Return the most frequent reasons of rejections, "8 x REASON; ..."; "" without any."""
        counts = Counter(rejection.reason for rejection in self.rejections())
        return "; ".join(f"{n:,} x {reason}" for reason, n in counts.most_common(most))


@dataclass(frozen=True)
class _Folder:
    """The part of one folder that a spec selects."""

    path: ShardFolder
    entries: list[ShardEntry]
    samples: np.ndarray | SampleRows
    checksums: np.ndarray | SampleRows
    class_names: tuple[str, ...] | None
    missing: list[str]
    """Shards that are in the index but no longer in the folder."""

    @property
    def is_old(self) -> bool:
        """True if a shard was indexed by an earlier reader."""
        return any(entry.reader < READER for entry in self.entries)


def _open_folder(folder: ShardFolder, names: list[str], share: Share) -> _Folder:
    command = f"`zeta shards index {folder}`"
    indexed = read_entries(folder.index, share)
    if indexed is None:
        where = f" in {folder.index} (see $ZETA_INDEX_DIR)" if folder.remote else ""
        raise ValueError(f"the shards in {folder} have no index{where}; type {command}")
    entries = indexed.entries
    class_names = read_class_names(folder.index)
    classes = classes_digest(class_names)
    known = {entry.name: number for number, entry in enumerate(entries)}
    for name in names:
        if name not in known:
            raise ValueError(f"shard {folder.shard(name)} is not in the index; type {command}")
    asked = share.of(names)
    for name, found in zip(asked, _stat(folder, asked), strict=True):
        entry = entries[known[name]]
        if (entry.nbytes, entry.mtime_ns) != found:
            raise ValueError(
                f"shard {folder.shard(name)} changed since it was indexed; type {command}"
            )
        if entry.classes != classes:
            raise ValueError(
                f"{folder.index / CLASSES_NAME} changed since indexing; type {command}"
            )
    present = names if folder.remote else {path.name for path in folder.index.iterdir()}
    missing = [entry.name for entry in entries if entry.name not in present]
    chosen = [known[name] for name in names]
    rows, checksums = (
        _rows(entries, column, chosen) for column in (indexed.samples, indexed.checksums)
    )
    return _Folder(folder, [entries[i] for i in chosen], rows, checksums, class_names, missing)


def _stat(folder: ShardFolder, names: Sequence[str]) -> Sequence[tuple[int, int]]:
    try:
        return folder.stat(names)
    except PermanentError as error:
        raise ValueError(f"shard {error.filename} cannot be read: {error.strerror}") from error


def _rows(
    entries: list[ShardEntry], samples: np.ndarray, chosen: list[int]
) -> np.ndarray | SampleRows:
    """Return the chosen entries' part of a column, as views of the mapped file, one a run."""
    ends = np.cumsum([entry.count for entry in entries])
    breaks = (np.flatnonzero(np.diff(chosen) != 1) + 1).tolist()
    runs = [(chosen[a], chosen[b - 1]) for a, b in pairwise([0, *breaks, len(chosen)])]
    return join_rows(
        [samples[ends[first] - entries[first].count : ends[last]] for first, last in runs]
    )


def _refuse_missing(folder: _Folder, spec: ShardSpec) -> None:
    """Raise ValueError if the spec covers a shard that is indexed but missing."""
    for text in spec_parts(spec):
        pattern = remote_pattern(text) if is_remote(text) else text
        whole_folder = Path(text).is_dir() and text == folder.path.location
        for name in folder.missing:
            if whole_folder or fnmatchcase(folder.path.shard(name), pattern):
                raise ValueError(
                    f"shard {folder.path.shard(name)} is indexed but missing; bring it back, or "
                    f"type `zeta shards index {folder.path}` to continue without it"
                )


def _refuse_other_classes(folder: _Folder, first: _Folder) -> None:
    if folder.class_names != first.class_names:
        raise ValueError(
            f"{first.path} and {folder.path} have different {CLASSES_NAME}; "
            "shards that train together need the same class map"
        )


def _concatenate(folders: list[_Folder]) -> Manifest:
    """Lay the shards of all folders end to end; a single folder stays memory-mapped."""
    shards, first = list[Shard](), 0
    digest = hashlib.sha256(classes_digest(folders[0].class_names).encode())
    older, content = digest.copy(), digest.copy()
    for folder in folders:
        for entry in folder.entries:
            if entry.count:
                path = folder.path.shard(entry.name)
                shards.append(Shard(path, entry.nbytes, entry.mtime_ns, first, entry.count))
            facts = [entry.name, entry.nbytes, entry.mtime_ns, entry.count, entry.digest]
            older.update(json.dumps(facts).encode())
            del facts[2]  # when the shard was copied
            digest.update(json.dumps(facts).encode())
            content.update(json.dumps([*facts, entry.checksums]).encode())
            first += entry.count
    parts = [folder.samples for folder in folders]
    entries = [entry for folder in folders for entry in folder.entries]
    return Manifest(
        shards=tuple(shards),
        samples=join_rows(parts),
        class_names=folders[0].class_names,
        fingerprint=digest.hexdigest(),
        highest_label=max(entry.highest_label for entry in entries),
        label_lists=sum(entry.label_lists for entry in entries),
        most_labels=max(entry.most_labels for entry in entries),
        old_index=next((str(folder.path) for folder in folders if folder.is_old), None),
        older_fingerprint=older.hexdigest(),
        checksums=join_rows([folder.checksums for folder in folders]),
        content_digest=content.hexdigest() if all(entry.checksums for entry in entries) else "",
        unread=joined((entry.ignored, entry.ignored_examples) for entry in entries),
    )


def _spelled(spec: ShardSpec) -> str:
    """Return the spec as one types it; for tar files of one folder, the folder."""
    parts = spec_parts(spec)
    folders = {part.rpartition("/")[0] for part in parts if part.endswith(".tar")}
    if len(parts) > 1 and len(folders) == 1 and all(part.endswith(".tar") for part in parts):
        return folders.pop() or "."
    return ", ".join(parts)


def _why_unusable(manifest: Manifest, first: ShardFolder) -> str:
    """Return why a manifest has no usable image, and what to do."""
    reasons = manifest.reasons()
    if not reasons:
        return "they are empty; write shards that hold images: `zeta shards build IMAGES OUT`"
    return (
        f"{reasons}; each is named in {first.index / REJECTED_NAME}: repair the images, then "
        "build the shards again in a new folder"
    )
