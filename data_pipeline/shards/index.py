"""Indexing shards: one pass over each, in parallel, for sizes, labels and checksums.

Every finished shard leaves a part file at once. So an interrupted run continues where it stopped,
and unchanged shards are never read again. The format of the result belongs to
`data_pipeline.shards.manifest`.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from data_pipeline.shards.atomic_file import write_atomically
from data_pipeline.shards.checksum import (
    CHECKSUM_DTYPE,
    UNKNOWN,
    checksum,
    checksum_at,
    rows_digest,
)
from data_pipeline.shards.folder import ShardFolder, ShardSpec, by_folder, resolve_shards
from data_pipeline.shards.images.header import (
    ImageError,
    ImageFormat,
    ImageHeader,
    ReadAt,
    read_header,
)
from data_pipeline.shards.index_parts import (
    PARTS_FOLDER,
    ShardPart,
    part_path,
    read_part,
    write_part,
)
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.manifest_files import (
    CLASSES_NAME,
    READER,
    SAMPLE_DTYPE,
    FolderIndex,
    RejectedLine,
    SampleFlag,
    ShardEntry,
    classes_digest,
    read_class_names,
    read_entries,
    read_rejected,
    write_entries,
)
from data_pipeline.shards.parallel import run_tasks
from data_pipeline.shards.remote import read_range, stat
from data_pipeline.shards.retry import PermanentError
from data_pipeline.shards.sample import (
    SampleError,
    caption_in_json,
    labels_in_json,
    parse_labels,
    pick_image,
    pick_roles,
    suffix_of,
)
from data_pipeline.shards.tar_reader import Member, iter_samples
from data_pipeline.shards.unread import UnreadParts, kind_of_entry

_ROW = struct.Struct("<QIHHiBBxx")
_MAX_NBYTES = 2**32 - 1
_MAX_METADATA = 2**24
_MAX_IN_MEMORY = 2**26
_UNSIZED = ImageHeader(ImageFormat.OTHER, 0, 0)


@dataclass
class ShardIndex:
    """The result of the index pass over one shard."""

    rows: bytearray = field(default_factory=bytearray)
    """Rows of `SAMPLE_DTYPE`, as bytes."""
    rejected: list[tuple[int, str, str]] = field(default_factory=list)
    """(row, key, reason) of each bad sample."""
    checksums: list[int] = field(default_factory=list)
    """Checksum of each sample; `UNKNOWN` if the pass read headers only."""
    highest_label: int = -1
    """Largest class index; -1 without labels."""
    label_lists: int = 0
    """Number of samples with several labels, or with an empty list."""
    most_labels: int = 1
    """Largest number of labels of a sample."""
    unread: UnreadParts = field(default_factory=UnreadParts)
    """Tar entries that belong to no sample, and members of samples that are not read."""


@dataclass
class _Targets:
    """The training targets of a sample."""

    labels: tuple[int, ...] | None = None
    captioned: bool = False

    @property
    def flags(self) -> SampleFlag:
        flags = SampleFlag(0) if self.labels is None else SampleFlag.LABELLED
        return flags | SampleFlag.CAPTIONED if self.captioned else flags


def index_shards(
    spec: ShardSpec, *, workers: int = 1, progress: bool = False, checksums: bool = True
) -> Manifest:
    """Index the shards that `spec` names, write the manifests beside them, and open the result.

    Shards whose size, mtime (or ETag) and class map are unchanged keep their rows, unless they lack
    the checksums that are asked for; other indexed shards of the same folders stay in the index
    while they exist. A sample whose image, header or
    label is unusable is flagged, with its reason in ``manifest_rejected.jsonl``.

    Args:
        spec: shards as `Manifest.open` takes them. The index of remote shards is written to
            `data_pipeline.shards.folder.index_root`.
        workers: number of processes.
        progress: print a progress bar to stderr.
        checksums: read all bytes of new and changed shards, for a checksum of each sample that is
            compared whenever it is read; otherwise headers only. Checksums that exist are kept.

    Raises:
        TarError: a shard is damaged or cut; names shard and byte.
        ValueError: no usable image was found, or the index cannot be written.
    """
    folders = by_folder(resolve_shards(spec))
    tasks = [task for folder, names in folders.items() for task in _tasks(folder, names, checksums)]
    nbytes = sum(task.nbytes for task in tasks)
    hidden = not (progress and tasks)
    with tqdm(total=len(tasks), unit=" shards", desc="index", disable=hidden) as bar:
        for _ in run_tasks(_index_to_part, tasks, workers, nbytes):
            bar.update()
    for folder, names in folders.items():
        _merge(folder, names)
    return Manifest.open(spec)


def index_shard(
    read_at: ReadAt,
    nbytes: int,
    shard: str,
    class_names: tuple[str, ...] | None,
    checksums: bool = True,
) -> ShardIndex:
    """Index one archive of `nbytes` behind `read_at`; `TarError` names it `shard`."""
    index = ShardIndex()
    for key, members in iter_samples(read_at, nbytes, shard):
        if not key:
            index.unread.note(kind_of_entry(members[0]), members[0].name)
            continue
        index.unread.note_sample(key, (member.name for member in members))
        offset, header, targets = members[0].offset, _UNSIZED, _Targets()
        flags = SampleFlag(0)
        span = members[-1].end - offset
        read_member = read_at
        if checksums and span <= _MAX_IN_MEMORY:
            data = read_at(offset, span)
            read_member = _in_memory(data, offset)
            index.checksums.append(checksum(data))
        else:
            index.checksums.append(checksum_at(read_at, offset, span) if checksums else UNKNOWN)
        try:
            header, targets = _examine(read_member, members, class_names)
            flags = targets.flags
            if span > _MAX_NBYTES:
                raise SampleError(f"sample of {span} bytes; at most 4 GiB are read")
        except (ImageError, SampleError) as error:
            row = len(index.rows) // _ROW.size
            index.rejected.append((row, key, str(error)))
            flags |= SampleFlag.BAD
        labels = targets.labels or ()
        index.highest_label = max(index.highest_label, *labels, -1)
        index.label_lists += targets.labels is not None and len(labels) != 1
        index.most_labels = max(index.most_labels, len(labels))
        label, size = next(iter(labels), -1), (header.height, header.width)
        index.rows += _ROW.pack(offset, min(span, _MAX_NBYTES), *size, label, header.format, flags)
    index.rejected = [(row, key, index.unread.reason(key, why)) for row, key, why in index.rejected]
    return index


def _examine(
    read_at: ReadAt, members: list[Member], class_names: tuple[str, ...] | None
) -> tuple[ImageHeader, _Targets]:
    """Return the image header and targets of a sample; else ImageError or SampleError."""
    by_suffix: dict[str, Member] = {}
    for member in members:
        suffix = suffix_of(member.name)
        if suffix in by_suffix:
            raise SampleError(f"two members .{suffix} under one key")
        by_suffix[suffix] = member
    image = by_suffix[pick_image(by_suffix)]
    header = read_header(_within(read_at, image), image.nbytes)
    targets = _Targets()
    roles = {role: by_suffix[suffix] for role, suffix in pick_roles(by_suffix).items()}
    if "cls" in roles:
        targets.labels = parse_labels(_content(read_at, roles["cls"]), class_names)
    if "txt" in roles:
        targets.captioned = roles["txt"].nbytes > 0
    if "json" in roles and not {"cls", "txt"} <= roles.keys():
        content = _content(read_at, roles["json"])
        if "cls" not in roles:
            targets.labels = labels_in_json(content, class_names)
        if "txt" not in roles:
            targets.captioned = _is_captioned(content)
    return header, targets


def _is_captioned(content: bytes) -> bool:
    """Return whether JSON holds a usable caption; a bad one does not reject the image."""
    try:
        return caption_in_json(content) is not None
    except SampleError:
        return False


def _content(read_at: ReadAt, member: Member) -> bytes:
    if member.nbytes > _MAX_METADATA:
        raise SampleError(f"metadata of {member.nbytes} bytes")
    return read_at(member.data_offset, member.nbytes)


def _in_memory(data: bytes, start: int) -> ReadAt:
    """Return a `ReadAt` of a file of which `data` at byte `start` is read already."""
    return lambda offset, count: data[offset - start : offset - start + count]


def _within(read_at: ReadAt, member: Member) -> ReadAt:
    """Return `read_at` relative to a member, ending where the member ends."""
    start, nbytes = member.data_offset, member.nbytes

    def read(offset: int, count: int) -> bytes:
        count = min(count, nbytes - offset)
        return read_at(start + offset, count) if count > 0 else b""

    return read


@dataclass(frozen=True)
class _Task:
    folder: ShardFolder
    name: str
    nbytes: int
    class_names: tuple[str, ...] | None
    checksums: bool


def _tasks(folder: ShardFolder, names: list[str], checksums: bool) -> list[_Task]:
    """Return tasks for the shards of a folder that neither its index nor a part file covers."""
    if folder.remote:
        folder.index.mkdir(parents=True, exist_ok=True)
        copy_class_names(folder)
    class_names = read_class_names(folder.index)
    indexed = read_entries(folder.index)
    known = {entry.name: entry for entry in indexed.entries} if indexed else {}
    tasks = []

    def serves(entry: ShardEntry, found: tuple[int, int, str]) -> bool:
        return _identity(entry) == (*found, READER) and bool(entry.checksums or not checksums)

    for name, (nbytes, mtime_ns) in zip(names, folder.stat(names), strict=True):
        entry, found = known.get(name), (nbytes, mtime_ns, classes_digest(class_names))
        if entry is not None and serves(entry, found):
            part_path(folder, name).unlink(missing_ok=True)
            continue
        part = read_part(folder, name)
        if part is None or not serves(part.entry, found):
            tasks.append(_Task(folder, name, nbytes, class_names, checksums))
    if tasks:
        try:
            (folder.index / PARTS_FOLDER).mkdir(exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cannot write the index beside the shards ({error}); "
                "link them into a folder that you can write to, and index that"
            ) from error
    return tasks


def copy_class_names(folder: ShardFolder) -> None:
    """Copy the class map beside remote shards, if it exists, to their index."""
    url, copy = folder.shard(CLASSES_NAME), folder.index / CLASSES_NAME
    try:
        content = read_range(url, 0, stat(url).nbytes)
    except PermanentError:
        copy.unlink(missing_ok=True)
        return
    if not copy.exists() or copy.read_bytes() != content:
        with write_atomically(copy) as stream:
            stream.write(content)


def _identity(entry: ShardEntry) -> tuple[int, int, str, int]:
    return entry.nbytes, entry.mtime_ns, entry.classes, entry.reader


def _index_to_part(task: _Task) -> None:
    """Index one shard into its part file."""
    with task.folder.open(task.name) as shard:
        path = task.folder.shard(task.name)
        index = index_shard(shard.read_at, shard.nbytes, path, task.class_names, task.checksums)
        rows = np.frombuffer(index.rows, SAMPLE_DTYPE)
        checksums = np.array(index.checksums, CHECKSUM_DTYPE)
        entry = ShardEntry(
            name=task.name,
            nbytes=shard.nbytes,
            mtime_ns=shard.mtime_ns,
            count=len(rows),
            bad=len(index.rejected),
            highest_label=index.highest_label,
            digest=hashlib.sha256(index.rows).hexdigest(),
            classes=classes_digest(task.class_names),
            ignored=dict(index.unread.counts),
            ignored_examples=index.unread.examples,
            label_lists=index.label_lists,
            most_labels=index.most_labels,
            reader=READER,
            checksums=rows_digest(rows, checksums) if task.checksums else "",
        )
    rejected = [RejectedLine(task.name, *line) for line in index.rejected]
    write_part(task.folder, ShardPart(entry, rejected, rows, checksums))


def _merge(folder: ShardFolder, names: list[str]) -> None:
    """Join part files and the valid rows of the old index into the index of a folder."""
    index = folder.index
    indexed = read_entries(index)
    parts = dict[str, ShardPart]()
    if indexed:
        places, rejected = indexed.slices(), read_rejected(index)
        for entry in indexed.entries:
            if folder.remote or (index / entry.name).exists():
                name, place = entry.name, places[entry.name]
                lines = rejected.get(name, [])
                parts[name] = ShardPart(
                    entry, lines, indexed.samples[place], indexed.checksums[place]
                )
    parts |= {name: part for name in names if (part := read_part(folder, name))}
    order = [parts[name] for name in sorted(parts)]
    entries = [part.entry for part in order]
    if indexed is None or entries != indexed.entries:
        samples = np.concatenate([np.empty(0, SAMPLE_DTYPE), *(part.rows for part in order)])
        checksums = np.concatenate(
            [np.empty(0, CHECKSUM_DTYPE), *(part.checksums for part in order)]
        )
        lines = [line for part in order for line in part.rejected]
        write_entries(index, FolderIndex(entries, samples, checksums), lines)
    for name in names:
        part_path(folder, name).unlink(missing_ok=True)
    if (index / PARTS_FOLDER).exists() and not any((index / PARTS_FOLDER).iterdir()):
        (index / PARTS_FOLDER).rmdir()
