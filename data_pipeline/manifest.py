"""The manifest: where every sample of a set of shards lies and how large its image is.

One pair of files describes the shards of a folder: ``manifest.json`` (shards, their sizes, mtimes
and digests, class names) and ``manifest-DIGEST.npy`` (24 bytes a sample, memory-mapped). The JSON
names the array by its content, so replacing the JSON replaces both at once. The samples that
cannot be trained on are rows like all others, flagged, with their reasons in
``manifest_rejected.jsonl``. `data_pipeline.index` writes these files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import IntFlag
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np

from data_pipeline.atomic_file import write_atomically
from data_pipeline.image_header import ImageFormat as ImageFormat

MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "manifest_rejected.jsonl"
CLASSES_NAME = "classes.json"
VERSION = 1

SAMPLE_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # byte of the sample's first tar header in its shard
        ("nbytes", "<u4"),  # of all its members, headers and padding included
        ("height", "<u2"),  # pixels, after EXIF orientation
        ("width", "<u2"),  # pixels, after EXIF orientation
        ("label", "<i4"),  # class index, -1 where there is none
        ("format", "u1"),  # data_pipeline.image_header.ImageFormat
        ("flags", "u1"),  # SampleFlag
        ("reserved", "<u2"),
    ]
)


class SampleFlag(IntFlag):
    """Bits of the ``flags`` column."""

    BAD = 1
    """Cannot be trained on: never planned, counted as rejected, its reason in the rejected list."""
    LABELLED = 2
    """Has a class label."""
    CAPTIONED = 4
    """Has a ``.txt`` member."""


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
class ShardEntry:
    """A shard as ``manifest.json`` lists it; its rows lie in the order of the list."""

    name: str
    nbytes: int
    mtime_ns: int
    count: int
    digest: str
    """Sha256 of its rows."""
    classes: str
    """Digest of the class map that its labels were read with."""
    ignored: dict[str, int]
    """Tar entries that belong to no sample, counted by kind."""


@dataclass(frozen=True)
class Rejection:
    """Why a sample is flagged as rejected."""

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
    samples: np.ndarray
    """[N] of SAMPLE_DTYPE, memory-mapped where the spec is one run of shards of one folder."""
    class_names: tuple[str, ...] | None
    fingerprint: str
    """Sha256 over names, sizes, mtimes, counts and row digests of the shards, and the classes."""

    @staticmethod
    def open(spec: str | Path | Sequence[str | Path]) -> Manifest:
        """Open the index of the shards that `spec` names, and check it against them.

        `spec` is a folder, a ``.tar`` file, a glob, a brace expansion, or a list of these; a
        shard named twice counts once. Raises ValueError, with the command to type, if shards are
        missing, were never indexed, changed since, or hold no samples.
        """
        groups = _by_folder(resolve_shards(spec))
        parts = [_open_folder(folder, names) for folder, names in groups.items()]
        for part in parts:
            _refuse_missing(part, spec)
        return _concatenate(parts, spec)

    @property
    def num_classes(self) -> int | None:
        """Size of the class map, else the highest label + 1; None without labels."""
        if self.class_names is not None:
            return len(self.class_names)
        highest = int(self.samples["label"].max())
        return highest + 1 if highest >= 0 else None

    @property
    def usable(self) -> np.ndarray:
        """[N] bool: the samples that are not flagged as rejected."""
        usable: np.ndarray = (self.samples["flags"] & SampleFlag.BAD) == 0
        return usable

    def shard_of(self, sample_ids: np.ndarray | int) -> np.ndarray:
        """Return the index in `shards` of each sample id; same shape as `sample_ids`."""
        firsts = np.array([shard.first for shard in self.shards])
        return np.searchsorted(firsts, sample_ids, side="right") - 1

    def rejections(self) -> Iterator[Rejection]:
        """Yield the flagged samples of these shards with their reasons, in order of id."""
        by_folder: dict[str, list[dict[str, Any]]] = {}
        for shard in self.shards:
            folder, name = Path(shard.path).parent, Path(shard.path).name
            lines = by_folder.setdefault(str(folder), read_rejected(folder))
            for line in lines:
                if line["shard"] == name:
                    sample_id = shard.first + line["row"]
                    yield Rejection(sample_id, shard.path, line["key"], line["reason"])


def resolve_shards(spec: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the tar files that a spec names, each once, sorted within a folder or a glob.

    Raises ValueError naming the part of the spec that matches nothing.
    """
    if isinstance(spec, str | Path):
        spec = [spec]
    if not isinstance(spec, Sequence):
        raise ValueError(f"shards are {spec!r}; give a folder, tar file, glob, braces or a list")
    found: dict[Path, None] = {}
    for part in spec:
        if not isinstance(part, str | Path):
            raise ValueError(f"shards hold {part!r}; each must be a path, glob or brace expansion")
        found.update(dict.fromkeys(_resolve_part(str(part))))
    if not found:
        raise ValueError("the list of shards is empty")
    return list(found)


def _resolve_part(text: str) -> list[Path]:
    if "://" in text:
        raise ValueError(f"{text} is remote; only local shards can be read: copy them first")
    if Path(text).is_dir():
        shards = sorted(path for path in Path(text).glob("*.tar") if not path.name.startswith("."))
        if not shards:
            raise ValueError(
                f"{text} holds no .tar shards; make some with `zeta shards build IMAGES {text}`"
            )
        return shards
    expanded = [text] if Path(text).is_file() else list(braceexpand.braceexpand(text))
    paths: list[Path] = []
    for pattern in expanded:
        path = Path(pattern)
        relative = pattern.removeprefix(path.anchor)
        matches = [path] if path.is_file() else sorted(Path(path.anchor).glob(relative))
        if not matches:
            raise ValueError(f"no shard matches {pattern}")
        paths += matches
    wrong = [path for path in paths if path.suffix != ".tar"]
    if wrong:
        raise ValueError(f"{wrong[0]} is not a .tar file")
    return paths


def _by_folder(paths: list[Path]) -> dict[Path, list[str]]:
    groups: dict[Path, list[str]] = {}
    for path in paths:
        groups.setdefault(path.parent, []).append(path.name)
    return groups


@dataclass(frozen=True)
class _Folder:
    path: Path
    entries: list[ShardEntry]
    samples: np.ndarray
    class_names: tuple[str, ...] | None
    missing: list[str]
    """Shards that are in the index and no longer in the folder."""


def read_entries(folder: Path) -> tuple[list[ShardEntry], np.ndarray] | None:
    """Return the indexed shards of a folder and all their rows (memory-mapped); None if none.

    Raises ValueError if the index cannot be read.
    """
    try:
        text = (folder / MANIFEST_NAME).read_text("utf-8")
    except FileNotFoundError:
        return None
    try:
        content = json.loads(text)
        if content["version"] != VERSION:
            return None
        entries = [ShardEntry(**entry) for entry in content["shards"]]
        samples = np.load(folder / content["samples"], mmap_mode="r", allow_pickle=False)
        if samples.dtype != SAMPLE_DTYPE or len(samples) != sum(e.count for e in entries):
            raise ValueError("the array does not match the list")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"{folder / MANIFEST_NAME} is damaged ({error}); delete it and type "
            f"`zeta shards index {folder}`"
        ) from error
    return entries, samples


def write_entries(
    folder: Path, entries: list[ShardEntry], samples: np.ndarray, rejected: list[dict[str, Any]]
) -> None:
    """Replace the index of a folder in one step; a reader sees the old or the new one."""
    digest = _sha256("".join(entry.digest for entry in entries))
    name = f"manifest-{digest[:16]}.npy"
    with write_atomically(folder / name) as stream:
        np.save(stream, samples)
    lines = "".join(json.dumps(line) + "\n" for line in rejected)
    with write_atomically(folder / REJECTED_NAME) as stream:
        stream.write(lines.encode())
    content = {"version": VERSION, "samples": name, "shards": [asdict(e) for e in entries]}
    with write_atomically(folder / MANIFEST_NAME) as stream:
        stream.write(json.dumps(content, indent=1).encode())
    for old in folder.glob("manifest-*.npy"):
        if old.name != name:
            old.unlink(missing_ok=True)


def read_rejected(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a folder's rejected list: shard, row, key, reason."""
    try:
        text = (folder / REJECTED_NAME).read_text("utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines()]


def read_class_names(folder: Path) -> tuple[str, ...] | None:
    """Return the class map of a folder, None without one; ValueError if it cannot be read."""
    try:
        names = json.loads((folder / CLASSES_NAME).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{folder / CLASSES_NAME} is not JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{folder / CLASSES_NAME} must be a JSON list of class names")
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"{folder / CLASSES_NAME} is empty or names a class twice")
    return tuple(names)


def classes_digest(class_names: tuple[str, ...] | None) -> str:
    """Return a digest of a class map, "" without one."""
    return "" if class_names is None else _sha256(json.dumps(class_names))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
    missing = [entry.name for entry in entries if not (folder / entry.name).exists()]
    chosen = [known[name] for name in names]
    rows = _rows(entries, samples, chosen)
    return _Folder(folder, [entries[i] for i in chosen], rows, class_names, missing)


def _refuse_missing(part: _Folder, spec: str | Path | Sequence[str | Path]) -> None:
    """Raise ValueError if the spec also names a shard that is indexed but no longer there."""
    for text in [spec] if isinstance(spec, str | Path) else spec:
        whole_folder = Path(text).is_dir() and Path(text) == part.path
        for name in part.missing:
            if whole_folder or fnmatchcase(str(part.path / name), str(text)):
                raise ValueError(
                    f"shard {part.path / name} is indexed but missing; bring it back, or type "
                    f"`zeta shards index {part.path}` to go on without it"
                )


def _rows(entries: list[ShardEntry], samples: np.ndarray, chosen: list[int]) -> np.ndarray:
    """Return the rows of the chosen entries: a view of the mapped file if they are one run."""
    ends = np.cumsum([entry.count for entry in entries])
    if chosen == list(range(chosen[0], chosen[0] + len(chosen))):
        return samples[ends[chosen[0]] - entries[chosen[0]].count : ends[chosen[-1]]]
    return np.concatenate([samples[ends[i] - entries[i].count : ends[i]] for i in chosen])


def _concatenate(parts: list[_Folder], spec: object) -> Manifest:
    shards, digest, first = list[Shard](), hashlib.sha256(), 0
    for part in parts:
        if part.class_names != parts[0].class_names:
            raise ValueError(
                f"{parts[0].path} and {part.path} have different {CLASSES_NAME}; "
                "shards that train together need the same class map"
            )
        digest.update(classes_digest(part.class_names).encode())
        for entry in part.entries:
            path = str(part.path / entry.name)
            shards.append(Shard(path, entry.nbytes, entry.mtime_ns, first, entry.count))
            digest.update(
                json.dumps(
                    [entry.name, entry.nbytes, entry.mtime_ns, entry.count, entry.digest]
                ).encode()
            )
            first += entry.count
    samples = parts[0].samples if len(parts) == 1 else np.concatenate([p.samples for p in parts])
    if not bool(((samples["flags"] & SampleFlag.BAD) == 0).any()):
        raise ValueError(f"the shards {spec} hold {len(samples)} samples and no usable image")
    return Manifest(tuple(shards), samples, parts[0].class_names, digest.hexdigest())
