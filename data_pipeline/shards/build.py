"""Building shards: cut a source into tar files whose bytes are the same on every run.

The order and the cuts are decided before anything is written. So shards are written in parallel,
each is whole or absent, and an interrupted build continues with the missing ones.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tqdm import tqdm

from data_pipeline.shards.atomic_file import remove_leftovers, write_atomically
from data_pipeline.shards.folder import OtherSourceError, ShardSpec
from data_pipeline.shards.held_out import split_source
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.manifest_files import write_class_names
from data_pipeline.shards.parallel import run_tasks
from data_pipeline.shards.sample import IMAGE_SUFFIXES
from data_pipeline.shards.shrinking.report import ShardReport, join_parts, write_part
from data_pipeline.shards.sources.content import read_members
from data_pipeline.shards.sources.read import (
    FilePart,
    Source,
    SourceSample,
    from_memory,
    open_source,
)
from zeta.files import local_path, read_json

if TYPE_CHECKING:  # it imports torch, which a build needs only where it writes
    from data_pipeline.shards.images.smaller import Shrinking

BUILD_NAME = "build.json"
_BLOCK = 512
_RECORD = 20 * _BLOCK


def build_shards(
    source: ShardSpec | Iterable[tuple[str, Mapping[str, bytes]]],
    out: str | Path,
    *,
    max_size_mb: float = 512,
    max_count: int = 10_000,
    seed: int | None = 0,
    labels: bool = True,
    class_names: Sequence[str] | None = None,
    root: str | Path | None = None,
    shrink: Shrinking | None = None,
    workers: int = 1,
    progress: bool = False,
) -> Manifest:
    """Write `source` as shards ``shard-000000.tar``, ... into the folder `out`, and index them.

    Args:
        source: a source for `open_source`, or an iterable of (key, content by suffix) in memory.
        out: folder to write. Shards that an interrupted build of the same source left are kept.
        max_size_mb: most bytes of a shard, in units of 1e6 bytes.
        max_count: most samples of a shard.
        seed: seed of the order, shuffled because class folders would otherwise give shards of one
            class; None keeps the order of the source.
        labels: treat the subfolders of an image folder as classes.
        class_names: class map of an in-memory source.
        root: folder that the files of a table must lie in; by default that of the table.
        shrink: write smaller copies of images, as `shards.shrinking.shrink.shrink_shards`; what
            became of them is in ``shrink_report.jsonl``. None: all stay as they are.
        workers: number of processes that write and index.
        progress: print progress bars and the counts of skipped files to stderr.

    Returns:
        The opened manifest; `out` also holds ``classes.json`` where classes have names. Equal
        sources give equal bytes.

    Raises:
        ValueError: the source holds no images, or `out` holds something else.
        OtherSourceError: `out` holds the shards of another source.
        DamagedSample: a sample of a shard is not as it was indexed; its copy would be taken for
            good.
    """
    folder = local_path(out, "out")
    opened = _open(source, labels, class_names, root)
    if progress:
        _report(opened.skipped)
    limits = (max_size_mb * 1e6, max_count)
    return _build(opened, folder, limits, seed, shrink, workers, progress)


def build_split(
    source: ShardSpec | Iterable[tuple[str, Mapping[str, bytes]]],
    out: str | Path,
    val_share: float,
    *,
    max_size_mb: float = 512,
    max_count: int = 10_000,
    seed: int | None = 0,
    labels: bool = True,
    class_names: Sequence[str] | None = None,
    root: str | Path | None = None,
    shrink: Shrinking | None = None,
    workers: int = 1,
    progress: bool = False,
) -> dict[str, Manifest]:
    """Write `source` as two sets of shards, `out`/train and `out`/val, and index them.

    A hash of its key decides whether a sample is held out, and samples of one picture (rows of a
    table that name one file, or files with equal bytes) fall on one side, by the first of their
    keys: another order, or more pictures in the source, move no sample between the sets. Each set
    has at least one image.

    Args:
        source, out, max_size_mb, max_count, seed, labels, class_names, root, shrink, workers,
            progress: see `build_shards`.
        val_share: share of the samples that is held out, above 0 and below 1.

    Returns:
        The manifests of `train` and `val`, which share one class map.

    Raises:
        ValueError: see `build_shards`; or there are too few samples to hold one out.
    """
    if not 0 < val_share < 1:
        raise ValueError(f"val_share is {val_share:g}; it must be above 0 and below 1, as in 0.05")
    folder = local_path(out, "out")
    if (folder / BUILD_NAME).exists():
        raise ValueError(
            f"{folder} holds shards that were built without a held-out share; choose another "
            "folder, or delete this one"
        )
    opened = _open(source, labels, class_names, root)
    if progress:
        _report(opened.skipped)
    limits = (max_size_mb * 1e6, max_count)
    manifests = {}
    for name, part in split_source(opened, val_share).items():
        if progress:
            print(f"{name}: {len(part.samples):,} samples", file=sys.stderr)
        manifests[name] = _build(part, folder / name, limits, seed, shrink, workers, progress)
    return manifests


def _build(
    opened: Source,
    folder: Path,
    limits: tuple[float, int],
    seed: int | None,
    shrink: Shrinking | None,
    workers: int,
    progress: bool,
) -> Manifest:
    """Write the samples as shards of at most `limits` (bytes, samples) into `folder`."""
    if shrink is not None:
        shrink.check()
    samples = opened.samples if seed is None else _shuffled(opened.samples, seed)
    shards = _cut(samples, *limits, shrink)
    _claim(folder, _digest(shards, opened.class_names, shrink), opened.skipped)
    if opened.class_names is not None:
        write_class_names(folder, opened.class_names)
    remove_leftovers(folder)
    tasks = [
        _Task(folder / f"shard-{number:06d}.tar", number, tuple(shard), shrink)
        for number, shard in enumerate(shards)
    ]
    missing = [task for task in tasks if not task.path.exists()]
    # As in a shrink, workers always pay off where images are decoded.
    nbytes = sum(_tar_bytes(sample, None) for task in missing for sample in task.samples)
    nbytes = nbytes if shrink is None else 2**62
    hidden = not (progress and missing)
    with tqdm(total=len(samples), unit=" samples", desc="build", disable=hidden) as bar:
        bar.update(len(samples) - sum(len(task.samples) for task in missing))
        for count in run_tasks(_write_shard, missing, workers, nbytes):
            bar.update(count)
    if shrink is not None:
        join_parts(folder, [task.path.name for task in tasks])
    return index_shards([task.path for task in tasks], workers=workers, progress=progress)


def _open(
    source: ShardSpec | Iterable[tuple[str, Mapping[str, bytes]]],
    labels: bool,
    class_names: Sequence[str] | None,
    root: str | Path | None,
) -> Source:
    if isinstance(source, str | Path):
        return open_source(source, labels=labels, root=root)
    paths: list[str | Path] = []
    pairs: list[tuple[str, Mapping[str, bytes]]] = []
    for number, item in enumerate(source):
        if isinstance(item, str | Path) and not pairs:
            paths.append(item)
        elif isinstance(item, tuple) and len(item) == 2 and not paths:
            pairs.append(item)
        else:
            raise ValueError(
                f"item {number} of the source is {item!r:.80}; all must be paths of shards, or all "
                "(key, {suffix: content}) pairs"
            )
    return open_source(paths, labels=labels) if paths else from_memory(pairs, class_names)


def _report(skipped: Counter[str]) -> None:
    for reason, count in sorted(skipped.items()):
        if count:
            print(f"skipped {count}: {reason}", file=sys.stderr)


def _shuffled(samples: list[SourceSample], seed: int) -> list[SourceSample]:
    """Return the samples in the order of a keyed hash: the same on every machine and version."""
    key = str(seed).encode()
    return sorted(
        samples,
        key=lambda item: hashlib.blake2b(item.key.encode(), key=key, digest_size=16).digest(),
    )


def _cut(
    samples: list[SourceSample], max_bytes: float, max_count: int, shrink: Shrinking | None
) -> list[list[SourceSample]]:
    """Cut the list into shards within both limits; a sample larger than a shard stands alone.

    The bytes of smaller copies are not known yet: at most a byte a pixel is assumed.
    """
    shards: list[list[SourceSample]] = [[]]
    size = 0
    for sample in samples:
        nbytes = _tar_bytes(sample, shrink)
        if shards[-1] and (_file_bytes(size + nbytes) > max_bytes or len(shards[-1]) >= max_count):
            shards.append([])
            size = 0
        shards[-1].append(sample)
        size += nbytes
    return shards


def _file_bytes(nbytes: int) -> int:
    """Return the bytes of a tar file, in whole records, around samples of `nbytes`."""
    return -(-(nbytes + 2 * _BLOCK) // _RECORD) * _RECORD


def _tar_bytes(sample: SourceSample, shrink: Shrinking | None) -> int:
    """Return the bytes that a sample takes in a tar: headers (PAX for long names) and padding."""
    total = 0
    for suffix, part in sample.members.items():
        name = f"{sample.key}.{suffix}".encode()
        extended = 2 * _BLOCK + len(name) if len(name) > 100 or not name.isascii() else 0
        nbytes = _nbytes(part)
        if shrink is not None and suffix.rpartition(".")[2] in IMAGE_SUFFIXES:
            nbytes = shrink.most_bytes(nbytes)
        total += _BLOCK + sum(-(-n // _BLOCK) * _BLOCK for n in (extended, nbytes))
    return total


def _nbytes(part: FilePart | bytes) -> int:
    return len(part) if isinstance(part, bytes) else part.nbytes


def _digest(
    shards: list[list[SourceSample]],
    class_names: tuple[str, ...] | None,
    shrink: Shrinking | None,
) -> str:
    """Return a digest of everything that decides the bytes of the shards."""
    digest = hashlib.sha256(json.dumps(class_names).encode())
    if shrink is not None:
        digest.update(json.dumps(shrink._asdict()).encode())
    for shard in shards:
        digest.update(b"shard")
        for sample in shard:
            parts = [
                [suffix, hashlib.sha256(part).hexdigest()]
                if isinstance(part, bytes)
                else [suffix, part.path, part.offset, part.nbytes, _version(sample, part)]
                for suffix, part in sorted(sample.members.items())
            ]
            digest.update(json.dumps([sample.key, parts]).encode())
    return digest.hexdigest()


def _version(sample: SourceSample, part: FilePart) -> int:
    """Return the checksum of bytes that an index knows, or else when their file was changed.

    A build that met a damaged shard goes on once the shard was copied again.
    """
    run = sample.run_of(part)
    return part.mtime_ns if run is None else run.checksum


def _claim(folder: Path, digest: str, skipped: Counter[str]) -> None:
    """Mark the folder as the build of this source; ValueError if it holds something else."""
    record = folder / BUILD_NAME
    if record.exists():
        what = f"delete it to build into {folder} from the beginning"
        built = read_json(record, limit=2**20, what=what)
        if not isinstance(built, dict) or built.get("source") != digest:
            raise OtherSourceError(
                f"{folder} holds shards of another source, or of this one before it changed or "
                "with other options; choose another folder, or delete this one"
            )
        return
    if (folder / "train" / BUILD_NAME).exists():
        raise ValueError(
            f"{folder} holds shards in train/ and val/, built with a held-out share (--val-share): "
            "pass it again to continue with them, or choose another folder"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not a shard build; choose a new or empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with write_atomically(record) as stream:
            stream.write(json.dumps({"source": digest, "skipped": +skipped}).encode())
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from error


@dataclass(frozen=True)
class _Task:
    path: Path
    number: int
    samples: tuple[SourceSample, ...]
    shrink: Shrinking | None


def _write_shard(task: _Task) -> int:
    """Write one shard under a hidden name and rename it; return its number of samples."""
    with _signals_deferred():
        from webdataset import ShardWriter  # here, because it imports torch

        from data_pipeline.shards.shrinking.sample import shrunk_sample

    dropped = task.shrink is not None and task.shrink.drop_unreadable
    report = ShardReport(task.path.name, dropped=dropped)
    with write_atomically(task.path) as stream:

        def give_stream(_: str) -> BinaryIO:
            return stream

        # Everything that varies between runs and machines is fixed; cuts were made before.
        with ShardWriter(
            "%d",
            maxcount=len(task.samples) + 1,
            maxsize=float("inf"),
            verbose=0,
            opener=give_stream,
            encoder=False,
            mtime=0,
            user="zeta",
            group="zeta",
        ) as writer:
            for sample in task.samples:
                content: Mapping[str, bytes] | None = read_members(sample)
                if content and task.shrink is not None:
                    content = shrunk_sample(sample.key, content, task.shrink, report)
                if content is not None:
                    writer.write({"__key__": sample.key, **content})
        if task.shrink is not None:
            write_part(task.path.parent, report)
    return len(task.samples)


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the block ends.

    An exception raised while torch's C++ code runs a Python import aborts the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are handled in the main thread
        return
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for deferred in handlers:
        signal.signal(deferred, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        for deferred, handler in handlers.items():
            signal.signal(deferred, handler)
    for number in received:
        signal.raise_signal(number)
