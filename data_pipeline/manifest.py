"""The manifest: where every sample of a set of shards lies and how large its image is.

24 bytes a sample, memory-mapped, so that order, sizes and packs are planned before any image is
read. `data_pipeline.index` writes it beside the shards; `Manifest.open` checks it against them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import braceexpand
import numpy as np

from data_pipeline.image_header import ImageFormat as ImageFormat
from data_pipeline.manifest_files import (
    CLASSES_NAME,
    RejectedLine,
    ShardEntry,
    classes_digest,
    read_class_names,
    read_entries,
    read_rejected,
)
from data_pipeline.manifest_files import SAMPLE_DTYPE as SAMPLE_DTYPE
from data_pipeline.manifest_files import SampleFlag as SampleFlag

ShardSpec = str | Path | Sequence[str | Path]
"""A folder, a ``.tar`` file, a glob, a brace expansion, or a list of these."""


@dataclass(frozen=True)
class Shard:
    """One tar file and its run of samples in the manifest."""

    path: str
    nbytes: int
    mtime_ns: int
    first: int
    """Sample id of its first sample."""
    count: int


@dataclass(frozen=True)
class Rejection:
    """Why a sample is flagged as bad."""

    sample_id: int
    shard: str
    key: str
    reason: str


@dataclass(frozen=True, eq=False)
class Manifest:
    """The samples of the shards that a spec names; a sample's id is its row.

    Ids depend on the spec and its order, and are the same wherever it is opened.
    """

    shards: tuple[Shard, ...]
    """Those that hold samples."""
    samples: np.ndarray
    """[N] of SAMPLE_DTYPE, memory-mapped where the spec is one run of shards of one folder."""
    class_names: tuple[str, ...] | None
    fingerprint: str
    """Sha256 over names, sizes, mtimes, counts and row digests of the shards, and the classes."""
    highest_label: int = -1
    """Largest class index of any sample, -1 without labels."""

    @staticmethod
    def open(spec: ShardSpec) -> Manifest:
        """Open the index of the shards that `spec` names, and check it against them.

        A shard named twice counts once. Raises ValueError, with the command to type, if shards
        are missing, were never indexed, changed since, or hold no usable image.
        """
        folders = [
            _open_folder(folder, names) for folder, names in by_folder(resolve_shards(spec)).items()
        ]
        for folder in folders:
            _refuse_missing(folder, spec)
            _refuse_other_classes(folder, folders[0])
        manifest = _concatenate(folders)
        bad = sum(entry.bad for folder in folders for entry in folder.entries)
        if bad == len(manifest.samples):
            raise ValueError(f"no usable image in the shards {spec}: {_reasons(manifest)}")
        return manifest

    def shard_of(self, sample_ids: np.ndarray | int) -> np.ndarray:
        """Return the index in `shards` of each sample id; same shape as `sample_ids`."""
        return np.searchsorted(self._firsts, sample_ids, side="right") - 1

    @cached_property
    def _firsts(self) -> np.ndarray:
        return np.array([shard.first for shard in self.shards])

    def rejections(self) -> Iterator[Rejection]:
        """Yield the flagged samples of these shards with their reasons, in order of id."""
        lines: dict[Path, dict[str, list[RejectedLine]]] = {}
        for shard in self.shards:
            path = Path(shard.path)
            if path.parent not in lines:
                lines[path.parent] = read_rejected(path.parent)
            for line in lines[path.parent].get(path.name, []):
                yield Rejection(shard.first + line.row, shard.path, line.key, line.reason)


def resolve_shards(spec: ShardSpec) -> list[Path]:
    """Return the tar files that a spec names, each once, sorted within a folder or a glob.

    Raises ValueError naming the part of the spec that matches nothing.
    """
    found: dict[Path, None] = {}
    for text in _parts(spec):
        found.update(dict.fromkeys(_resolve_part(text)))
    return list(found)


def _parts(spec: ShardSpec) -> list[str]:
    """Return the parts of a spec as text, a leading ~ replaced."""
    if not isinstance(spec, str | Path | Sequence):
        raise ValueError(f"shards are {spec!r}; give a folder, tar file, glob, braces or a list")
    texts = []
    for part in [spec] if isinstance(spec, str | Path) else spec:
        if not isinstance(part, str | Path):
            raise ValueError(f"shards hold {part!r}; each must be a path, glob or brace expansion")
        if "://" in str(part):
            raise ValueError(f"{part} is remote; only local shards can be read: copy them first")
        texts.append(str(Path(part).expanduser()))
    if not texts:
        raise ValueError("the list of shards is empty")
    return texts


def by_folder(paths: list[Path]) -> dict[Path, list[str]]:
    """Return the file names of paths by their folder, both in order of first appearance."""
    groups: dict[Path, list[str]] = {}
    for path in paths:
        groups.setdefault(path.parent, []).append(path.name)
    return groups


def _resolve_part(text: str) -> list[Path]:
    if Path(text).is_dir():
        shards = sorted(path for path in Path(text).glob("*.tar") if not path.name.startswith("."))
        if not shards:
            raise ValueError(
                f"{text} holds no .tar shards; write some with `zeta shards build IMAGES OUT`"
            )
        return shards
    paths: list[Path] = []
    for pattern in [text] if Path(text).is_file() else braceexpand.braceexpand(text):
        path = Path(pattern)
        relative = pattern.removeprefix(path.anchor)
        matches = [path] if path.is_file() else sorted(Path(path.anchor).glob(relative))
        if not matches:
            raise ValueError(f"no shard matches {pattern}")
        paths += matches
    for path in paths:
        if path.suffix != ".tar" or not path.is_file():
            raise ValueError(f"{path} is not a .tar file")
    return paths


@dataclass(frozen=True)
class _Folder:
    """What a spec selects of one folder."""

    path: Path
    entries: list[ShardEntry]
    samples: np.ndarray
    class_names: tuple[str, ...] | None
    missing: list[str]
    """Shards that are in the index and no longer in the folder."""


def _open_folder(folder: Path, names: list[str]) -> _Folder:
    command = f"`zeta shards index {folder}`"
    indexed = read_entries(folder)
    if indexed is None:
        raise ValueError(f"the shards in {folder} have no index; type {command}")
    entries, samples = indexed
    class_names = read_class_names(folder)
    classes = classes_digest(class_names)
    known = {entry.name: number for number, entry in enumerate(entries)}
    for name in names:
        if name not in known:
            raise ValueError(f"shard {folder / name} is not in the index; type {command}")
        entry, status = entries[known[name]], (folder / name).stat()
        if (entry.nbytes, entry.mtime_ns) != (status.st_size, status.st_mtime_ns):
            raise ValueError(f"shard {folder / name} changed since it was indexed; type {command}")
        if entry.classes != classes:
            raise ValueError(f"{folder / CLASSES_NAME} changed since indexing; type {command}")
    present = {path.name for path in folder.iterdir()}
    missing = [entry.name for entry in entries if entry.name not in present]
    chosen = [known[name] for name in names]
    rows = _rows(entries, samples, chosen)
    return _Folder(folder, [entries[i] for i in chosen], rows, class_names, missing)


def _rows(entries: list[ShardEntry], samples: np.ndarray, chosen: list[int]) -> np.ndarray:
    """Return the rows of the chosen entries: a view of the mapped file if they are one run."""
    ends = np.cumsum([entry.count for entry in entries])
    if chosen == list(range(chosen[0], chosen[0] + len(chosen))):
        return samples[ends[chosen[0]] - entries[chosen[0]].count : ends[chosen[-1]]]
    return np.concatenate([samples[ends[i] - entries[i].count : ends[i]] for i in chosen])


def _refuse_missing(folder: _Folder, spec: ShardSpec) -> None:
    """Raise ValueError if the spec also names a shard that is indexed but no longer there."""
    for text in _parts(spec):
        whole_folder = Path(text).is_dir() and Path(text) == folder.path
        for name in folder.missing:
            if whole_folder or fnmatchcase(str(folder.path / name), text):
                raise ValueError(
                    f"shard {folder.path / name} is indexed but missing; bring it back, or type "
                    f"`zeta shards index {folder.path}` to go on without it"
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
    for folder in folders:
        for entry in folder.entries:
            if entry.count:
                path = str(folder.path / entry.name)
                shards.append(Shard(path, entry.nbytes, entry.mtime_ns, first, entry.count))
            facts = [entry.name, entry.nbytes, entry.mtime_ns, entry.count, entry.digest]
            digest.update(json.dumps(facts).encode())
            first += entry.count
    parts = [folder.samples for folder in folders]
    return Manifest(
        shards=tuple(shards),
        samples=parts[0] if len(parts) == 1 else np.concatenate(parts),
        class_names=folders[0].class_names,
        fingerprint=digest.hexdigest(),
        highest_label=max(e.highest_label for folder in folders for e in folder.entries),
    )


def _reasons(manifest: Manifest) -> str:
    counts = Counter(rejection.reason for rejection in manifest.rejections())
    return "; ".join(f"{n} x {reason}" for reason, n in counts.most_common(3)) or "they are empty"
