"""Sources of shards: an image folder, a table of paths, existing shards, or memory.

Every source becomes one list of `SourceSample` in a fixed order, with the class map, and with the
counts of skipped files by reason. No image is opened here; the index checks them. Samples of shards
carry the checksums of their index, if there are any, with which their bytes are compared when they
are read (`sources.content`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from data_pipeline.shards.checksum import UNKNOWN
from data_pipeline.shards.folder import (
    ShardSpec,
    by_folder,
    folder_of,
    resolve_shards,
    spec_parts,
)
from data_pipeline.shards.known_checksums import by_place, known_checksums
from data_pipeline.shards.manifest_files import read_class_names
from data_pipeline.shards.remote import is_remote
from data_pipeline.shards.sample import IMAGE_SUFFIXES, SampleError, pick_image, suffix_of
from data_pipeline.shards.sources.folder import from_folder, unreadable
from data_pipeline.shards.sources.sample import FilePart as FilePart
from data_pipeline.shards.sources.sample import IndexedPart, clean_key
from data_pipeline.shards.sources.sample import Source as Source
from data_pipeline.shards.sources.sample import SourceSample as SourceSample
from data_pipeline.shards.sources.table import from_table
from data_pipeline.shards.sources.table_rows import TABLE_SUFFIXES
from data_pipeline.shards.tar_reader import Member, ShardFile, iter_samples

_Found: TypeAlias = tuple[dict[str, FilePart | bytes], list[IndexedPart]]
"""Members by suffix, and the runs of bytes that hold them."""


def open_source(
    source: ShardSpec, *, labels: bool = True, root: str | Path | None = None
) -> Source:
    """List the samples of a source. A source is

    - a folder of images: the class of an image is the name of the folder directly below `source`
      that holds it, however deep; a folder without subfolders gives no labels;
    - a ``.csv`` or ``.jsonl`` file with a column ``path`` (relative to the file, or absolute, but
      inside `root`, by default the folder of the file) and ``label`` and/or ``caption``; labels
      are all integers, which are class indices, or all names;
    - shards (a folder of ``.tar``, tar files, globs, braces): their samples as they are.

    With ``labels=False`` folders are not classes, and the labels of a table are ignored.

    Raises:
        ValueError: nothing can be read, or no image is found; the message has what to do.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.suffix.lower() in TABLE_SUFFIXES:
            return _with_unique_keys(from_table(path, labels, root))
        if path.is_dir() and not _holds_only_shards(path):
            return _with_unique_keys(from_folder(path, labels))
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
    listed = [SourceSample(clean_key(key), dict(members)) for key, members in samples]
    if not listed:
        raise ValueError(
            "there are no samples to write; give at least one (key, {suffix: content}) pair"
        )
    names = None if class_names is None else tuple(class_names)
    return _with_unique_keys(Source(listed, names))


def _holds_only_shards(folder: Path) -> bool:
    """Return whether a folder holds tar files, and neither images nor folders beside them."""
    try:
        visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise unreadable(error) from error
    return any(path.suffix == ".tar" for path in visible) and not any(
        path.is_dir() or path.suffix.lower()[1:] in IMAGE_SUFFIXES for path in visible
    )


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
    groups = by_folder([str(path) for path in paths])
    indexed = {folder: known_checksums(folder, names) for folder, names in groups.items()}
    for path in paths:
        folder, name = folder_of(str(path))
        known = by_place(indexed[folder].get(name))
        partial: dict[str, _Found] = {}
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
                runs = _known_run(str(path), members, shard.mtime_ns, known)
                if not _join_parts(partial, key, content, runs):
                    partial[key] = content, runs
                    samples.append(SourceSample(key, content, runs))
    if not samples:
        raise ValueError(f"the shards {spec} hold no samples")
    return Source(samples, class_maps.pop(), skipped)


def _known_run(
    path: str, members: Sequence[Member], mtime_ns: int, known: Mapping[tuple[int, int], int]
) -> list[IndexedPart]:
    """Return the bytes of consecutive members, if the index has their checksum; else nothing."""
    start, nbytes = members[0].offset, members[-1].end - members[0].offset
    expected = known.get((start, nbytes), UNKNOWN)
    part = FilePart(path, start, nbytes, mtime_ns)
    return [] if expected == UNKNOWN else [IndexedPart(part, expected)]


def _join_parts(
    partial: dict[str, _Found],
    key: str,
    content: dict[str, FilePart | bytes],
    runs: list[IndexedPart],
) -> bool:
    """Add members to the sample that lies elsewhere in the shard; return False if there is none.

    A shard may hold all images first and then all labels. Two images are two samples.
    """
    known, known_runs = partial.get(key, ({}, []))
    if not known or known.keys() & content.keys():
        return False
    if _has_image(known) and _has_image(content):
        return False
    known.update(content)
    known_runs += runs
    return True


def _has_image(suffixes: Iterable[str]) -> bool:
    try:
        pick_image(suffixes)
    except SampleError:
        return False
    return True


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
        samples.append(sample if key == sample.key else replace(sample, key=key))
    return Source(samples, source.class_names, source.skipped)
