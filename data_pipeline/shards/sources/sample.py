"""The samples of a source of shards, and the keys and suffixes under which they are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from data_pipeline.shards.sample import IMAGE_SUFFIXES

_JPEG_NAMES = ("jpeg", "jfif", "jpe")


@dataclass(frozen=True, slots=True)
class FilePart:
    """A range of bytes in a file."""

    path: str
    offset: int
    nbytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class IndexedPart:
    """A run of bytes of a shard, tar headers included, and the checksum that its index has."""

    part: FilePart
    checksum: int


@dataclass(frozen=True, slots=True)
class SourceSample:
    """A sample to write: its key, and its members by suffix."""

    key: str
    members: Mapping[str, FilePart | bytes]
    indexed: Sequence[IndexedPart] = ()
    """Runs of bytes that hold members, to be compared when these are read."""

    def run_of(self, member: FilePart) -> IndexedPart | None:
        """Return the run of bytes that holds a member; None: no index knows its bytes."""
        for run in self.indexed:
            start = member.offset - run.part.offset
            if member.path == run.part.path and 0 <= start <= run.part.nbytes - member.nbytes:
                return run
        return None


@dataclass(frozen=True)
class Source:
    """A source: all its samples, in a fixed order."""

    samples: list[SourceSample]
    class_names: tuple[str, ...] | None
    """Names of the classes in ``.cls`` members; None if labels are plain integers or absent."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of skipped files or rows, by reason."""


def key_of(path: PurePath) -> str:
    """Return the key of a relative path: its parts without the extension."""
    parts = [part for part in path.with_suffix("").parts if part not in ("..", path.anchor)]
    return clean_key("/".join(parts))


def clean_key(key: str) -> str:
    """Return a key that tar and webdataset keep intact: UTF-8, no dot in its last part."""
    key = "".join(c if c.isprintable() else "_" for c in utf8(key)).strip("/")
    if key.startswith("__"):
        key = key.lstrip("_")  # webdataset skips names like __meta__
    folder, slash, name = key.rpartition("/")
    return folder + slash + (name.replace(".", "_").strip() or "_")


def utf8(name: str) -> str:
    """Return a file name as text, with a mark in the place of bytes that are not UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def image_suffix(path: Path) -> str:
    """Return the suffix under which an image file is written."""
    suffix = path.suffix.lower()[1:]
    return "jpg" if suffix in _JPEG_NAMES or suffix not in IMAGE_SUFFIXES else suffix


def file_part(path: Path) -> FilePart:
    """Return a whole file as a part."""
    status = path.stat()
    return FilePart(str(path), 0, status.st_size, status.st_mtime_ns)
