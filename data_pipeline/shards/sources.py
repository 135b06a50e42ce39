"""Sources of shards: an image folder, a table of paths, existing shards, or memory.

Every source becomes one list of `SourceSample` in a fixed order, with the class map, and with the
counts of skipped files by reason. No image is opened here; the index checks them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from data_pipeline.shards.folder import ShardSpec, resolve_shards, spec_parts
from data_pipeline.shards.manifest_files import read_class_names
from data_pipeline.shards.remote import is_remote
from data_pipeline.shards.sample import IMAGE_SUFFIXES, suffix_of
from data_pipeline.shards.table_rows import TABLE_SUFFIXES, TableRow, class_indices, read_rows
from data_pipeline.shards.tar_reader import ShardFile, iter_samples


@dataclass(frozen=True, slots=True)
class FilePart:
    """A range of bytes in a file."""

    path: str
    offset: int
    nbytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class SourceSample:
    """A sample to write: its key, and its members by suffix."""

    key: str
    members: Mapping[str, FilePart | bytes]


@dataclass(frozen=True)
class Source:
    """A source: all its samples, in a fixed order."""

    samples: list[SourceSample]
    class_names: tuple[str, ...] | None
    """Names of the classes in ``.cls`` members; None if labels are plain integers or absent."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of skipped files or rows, by reason."""


def open_source(source: ShardSpec, *, labels: bool = True) -> Source:
    """List the samples of a source. A source is

    - a folder of images: the class of an image is the name of the folder directly below `source`
      that holds it, however deep; a folder without subfolders gives no labels;
    - a ``.csv`` or ``.jsonl`` file with a column ``path`` (relative to the file, or absolute) and
      ``label`` and/or ``caption``; labels that are all integers are class indices, others names;
    - shards (a folder of ``.tar``, tar files, globs, braces): their samples as they are.

    With ``labels=False`` folders are not classes, and the labels of a table are ignored.

    Raises:
        ValueError: nothing can be read, or no image is found; the message has what to do.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix.lower() in TABLE_SUFFIXES:
            return _with_unique_keys(_from_table(path, labels))
        if path.is_dir() and not _holds_only_shards(path):
            return _with_unique_keys(_from_folder(path, labels))
        if path.is_file() and path.suffix != ".tar":
            raise ValueError(
                f"{source} is a single file; give the folder that the images are in, a .csv or "
                ".jsonl file of path and label, or .tar shards"
            )
        if not path.exists() and path.suffix != ".tar":
            raise ValueError(
                f"{source} does not exist; give a folder of images, a .csv or .jsonl file of "
                "path and label, or .tar shards"
            )
    return _with_unique_keys(_from_shards(source))


def from_memory(
    samples: Iterable[tuple[str, Mapping[str, bytes]]], class_names: Sequence[str] | None = None
) -> Source:
    """Return a source of (key, content by suffix) pairs; ``.cls`` members index `class_names`."""
    listed = [SourceSample(_clean_key(key), dict(members)) for key, members in samples]
    if not listed:
        raise ValueError(
            "there are no samples to write; give at least one (key, {suffix: content}) pair"
        )
    names = None if class_names is None else tuple(class_names)
    return _with_unique_keys(Source(listed, names))


def _from_folder(folder: Path, labels: bool) -> Source:
    skipped: Counter[str] = Counter()
    files = [(path.relative_to(folder).parts, path) for path in _walk(folder, skipped)]
    classes = sorted({parts[0] for parts, _ in files if len(parts) > 1}) if labels else []
    index = {name: number for number, name in enumerate(classes)}
    samples = []
    for parts, path in files:
        if classes and len(parts) == 1:
            skipped["image beside the class folders, so without a class"] += 1
            continue
        members: dict[str, FilePart | bytes] = {_image_suffix(path): _file_part(path)}
        if classes:
            members["cls"] = str(index[parts[0]]).encode()
        samples.append(SourceSample(_key_of(PurePath(*parts)), members))
    if not samples:
        raise ValueError(
            f"no images found in {folder} ({_summary(skipped)}); it must hold image files "
            f"({', '.join(IMAGE_SUFFIXES[:5])}, ...), or one folder of them per class"
        )
    return Source(samples, tuple(_utf8(name) for name in classes) or None, skipped)


def _holds_only_shards(folder: Path) -> bool:
    """Return whether a folder holds tar files, and neither images nor folders beside them."""
    try:
        visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise _unreadable(error) from error
    return any(path.suffix == ".tar" for path in visible) and not any(
        path.is_dir() or path.suffix.lower()[1:] in IMAGE_SUFFIXES for path in visible
    )


def _unreadable(error: OSError) -> ValueError:
    return ValueError(
        f"cannot read the folder {error.filename}: {error.strerror}; "
        "make it readable, or move it out of the source"
    )


def _walk(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    """Yield the image files under a folder, sorted; follow links, but visit a folder once."""

    def refuse(error: OSError) -> None:
        raise _unreadable(error) from error

    visited: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        status = Path(place).stat()
        if (status.st_dev, status.st_ino) in visited:
            skipped["folder linked twice"] += 1
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        hidden = [name for name in folders if name.startswith(".")]
        skipped["hidden folder"] += len(hidden)
        folders[:] = sorted(set(folders) - set(hidden))
        for name in sorted(files):
            path = Path(place, name)
            if name.startswith("."):
                skipped["hidden file"] += 1
            elif path.suffix.lower()[1:] not in IMAGE_SUFFIXES:
                skipped[f"not an image by its name ({path.suffix or 'no extension'})"] += 1
            elif not path.is_file():
                skipped["broken link, or not a regular file"] += 1
            else:
                yield path


def _from_table(table: Path, labels: bool) -> Source:
    skipped: Counter[str] = Counter()
    rows = read_rows(table)
    kept: list[tuple[Path, TableRow]] = []
    for row in rows:
        path = table.parent / row.path
        if not row.path or not path.is_file():
            skipped["row whose file does not exist"] += 1
        else:
            kept.append((path, row if labels else row._replace(label="")))
    if not kept:
        raise ValueError(
            f"{table} names no file that exists ({len(rows)} rows); "
            f"paths are relative to {table.parent.resolve()}"
        )
    classes, index = class_indices((row.label for _, row in kept if row.label), table)
    samples = []
    for path, row in kept:
        members: dict[str, FilePart | bytes] = {_image_suffix(path): _file_part(path)}
        if row.label:
            members["cls"] = str(index[row.label]).encode()
        if row.caption:
            members["txt"] = row.caption.encode("utf-8")
        relative = os.path.relpath(path, table.parent)
        samples.append(SourceSample(_key_of(PurePath(relative)), members))
    return Source(samples, classes, skipped)


def _from_shards(spec: ShardSpec) -> Source:
    for part in spec_parts(spec):
        if is_remote(part):
            raise ValueError(f"{part} is remote; shards are built from local ones: copy them first")
    paths, skipped = [Path(shard) for shard in resolve_shards(spec)], Counter[str]()
    class_maps = {read_class_names(path.parent) for path in paths}
    if len(class_maps) > 1:
        raise ValueError(
            "the shards come from folders with different classes.json; build from one folder at "
            "a time"
        )
    samples = []
    for path in paths:
        with ShardFile(str(path)) as shard:
            for key, members in iter_samples(shard.read_at, shard.nbytes, str(path)):
                if not key:
                    skipped["tar entry that belongs to no sample"] += 1
                    continue
                content: dict[str, FilePart | bytes] = {}
                for member in members:
                    suffix = suffix_of(member.name)
                    if suffix in content:
                        raise ValueError(f"{path}: two members .{suffix} under the key {key}")
                    content[suffix] = FilePart(
                        str(path), member.data_offset, member.nbytes, shard.mtime_ns
                    )
                samples.append(SourceSample(key, content))
    if not samples:
        raise ValueError(f"the shards {spec} hold no samples")
    return Source(samples, class_maps.pop(), skipped)


def _with_unique_keys(source: Source) -> Source:
    """Number the later samples of those that share a key (a.jpg and a.png, or two rows)."""
    taken = {sample.key for sample in source.samples}
    seen: set[str] = set()
    samples = []
    for sample in source.samples:
        key, number = sample.key, 1
        while key in seen or (number > 1 and key in taken):
            number += 1
            key = f"{sample.key}-{number}"
        seen.add(key)
        samples.append(sample if key == sample.key else SourceSample(key, sample.members))
    return Source(samples, source.class_names, source.skipped)


def _key_of(path: PurePath) -> str:
    """Return the key of a relative path: its parts without the extension."""
    parts = [part for part in path.with_suffix("").parts if part not in ("..", path.anchor)]
    return _clean_key("/".join(parts))


def _clean_key(key: str) -> str:
    """Return a key that tar and webdataset keep intact: UTF-8, no dot in its last part."""
    key = "".join(c if c.isprintable() else "_" for c in _utf8(key)).strip("/")
    if key.startswith("__"):
        key = key.lstrip("_")  # webdataset skips names like __meta__
    folder, slash, name = key.rpartition("/")
    return folder + slash + (name.replace(".", "_").strip() or "_")


def _utf8(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _image_suffix(path: Path) -> str:
    suffix = path.suffix.lower()[1:]
    return "jpg" if suffix == "jpeg" or suffix not in IMAGE_SUFFIXES else suffix


def _file_part(path: Path) -> FilePart:
    status = path.stat()
    return FilePart(str(path), 0, status.st_size, status.st_mtime_ns)


def _summary(skipped: Counter[str]) -> str:
    found = [f"{count} x {reason}" for reason, count in skipped.most_common() if count]
    return "; ".join(found) or "it is empty"
