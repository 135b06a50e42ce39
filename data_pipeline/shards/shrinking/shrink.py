"""Shrinking shards: the same samples, with images of the size that is trained.

Every shard becomes one shard of the same name. Bytes that do not belong to a smaller copy are those
of the source: headers, labels, captions, other members. Shards are written in parallel, each is
whole or absent, and an interrupted run continues with the missing ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_pipeline.shards.atomic_file import remove_leftovers, write_atomically
from data_pipeline.shards.folder import (
    OtherSourceError,
    ShardFolder,
    ShardSpec,
    by_folder,
    resolve_shards,
)
from data_pipeline.shards.images.smaller import Shrinking
from data_pipeline.shards.index import copy_class_names, index_shards
from data_pipeline.shards.known_checksums import KnownChecksums, by_place, known_checksums
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.manifest_files import read_class_names, write_class_names
from data_pipeline.shards.parallel import run_tasks
from data_pipeline.shards.shrinking.report import ShardReport, join_parts, read_reports, write_part
from data_pipeline.shards.shrinking.tar import write_shrunk
from zeta.files import local_path, read_json

RECORD_NAME = "shrink.json"
_ALWAYS_PARALLEL = 2**62  # bytes: decoding takes long enough that processes pay off


@dataclass(frozen=True)
class Shrunk:
    """The result of `shrink_shards`."""

    manifest: Manifest
    """The opened index of the new shards."""
    reports: list[ShardReport]
    """What became of the images of each shard."""


def shrink_shards(
    spec: ShardSpec,
    out: str | Path,
    rule: Shrinking,
    *,
    workers: int = 1,
    progress: bool = False,
) -> Shrunk:
    """Write the shards of `spec` into the folder `out` with smaller copies of their images.

    Images are copied by `data_pipeline.shards.images.smaller.smaller_copy`; those that are small
    enough, other members, their order and the class map stay byte for byte. A sample whose image
    cannot be read stays as it is, or is left out by `rule.drop_unreadable`; either way it is in
    the report. Of a sample with several images, the one that is trained on becomes smaller.

    Args:
        spec: shards as `Manifest.open` takes them, local or remote.
        out: folder to write. Shards that an interrupted run of the same source left are kept.
        rule: size and quality of the copies.
        workers: number of processes.
        progress: print progress bars to stderr.

    Raises:
        OtherSourceError: `out` holds shards of another source, or of another rule.
        ValueError: two shards have one name, or `out` holds something else.
        TarError: a shard is damaged or cut; names shard and byte.
        DamagedSample: a sample is not as it was indexed; its copy would be taken for good.
    """
    rule.check()
    folder = local_path(out, "out")
    folders = by_folder(resolve_shards(spec))
    _check_names(folders, folder)
    class_names = _class_names(folders)
    tasks = [
        _Task(place, name, stamp, folder / name, rule, known.get(name))
        for place, names in folders.items()
        for known in [known_checksums(place, names)]
        for name, stamp in zip(names, place.stat(names), strict=True)
    ]
    _claim(folder, tasks, class_names)
    if class_names is not None:
        write_class_names(folder, class_names)
    remove_leftovers(folder)
    done = read_reports(folder)
    missing = [task for task in tasks if task.name not in done or not task.path.exists()]
    hidden = not (progress and missing)
    with tqdm(total=len(tasks), unit=" shards", desc="shrink", disable=hidden) as bar:
        bar.update(len(tasks) - len(missing))
        for _ in run_tasks(_shrink_shard, missing, workers, _ALWAYS_PARALLEL):
            bar.update()
    reports = join_parts(folder, [task.name for task in tasks])
    paths: list[str | Path] = [task.path for task in tasks]
    return Shrunk(index_shards(paths, workers=workers, progress=progress), reports)


@dataclass(frozen=True)
class _Task:
    folder: ShardFolder
    name: str
    stamp: tuple[int, int]
    """Bytes, and mtime or hash of the ETag, of the source."""
    path: Path
    rule: Shrinking
    known: KnownChecksums | None = None


def _shrink_shard(task: _Task) -> None:
    """Write one shard under a hidden name, its line of the report, and rename it."""
    source = task.folder.shard(task.name)
    with task.folder.open(task.name) as shard:
        if (shard.nbytes, shard.mtime_ns) != task.stamp:
            raise ValueError(f"{source} changed while shards were shrunk; run the command again")
        with write_atomically(task.path) as stream:
            report = write_shrunk(
                shard.read_at, shard.nbytes, source, stream, task.rule, by_place(task.known)
            )
            write_part(task.path.parent, report)


def _check_names(folders: dict[ShardFolder, list[str]], out: Path) -> None:
    """Raise ValueError if two shards would have one name, or a shard would replace its source."""
    place_of: dict[str, ShardFolder] = {}
    for place, names in folders.items():
        if not place.remote and os.path.realpath(place.location) == os.path.realpath(out):
            raise ValueError(f"{out} is the folder of the shards themselves; choose another OUT")
        for name in names:
            other = place_of.setdefault(name, place)
            if other != place:
                raise ValueError(
                    f"{other.shard(name)} and {place.shard(name)} have one name, and OUT is one "
                    "folder: shrink each folder of shards into a folder of its own"
                )


def _class_names(folders: dict[ShardFolder, list[str]]) -> tuple[str, ...] | None:
    """Return the class map that all folders share; ValueError if they have different ones."""
    found: dict[tuple[str, ...] | None, ShardFolder] = {}
    for place in folders:
        if place.remote:
            place.index.mkdir(parents=True, exist_ok=True)
            copy_class_names(place)
        found.setdefault(read_class_names(place.index), place)
    if len(found) > 1:
        raise ValueError(
            f"{' and '.join(map(str, found.values()))} have different classes.json: shrink each "
            "folder of shards into a folder of its own"
        )
    return next(iter(found))


def _claim(folder: Path, tasks: Sequence[_Task], class_names: tuple[str, ...] | None) -> None:
    """Mark the folder as that of this source and rule; ValueError if it holds something else."""
    rule = tasks[0].rule._asdict()
    facts = [[task.name, *task.stamp] for task in tasks]
    digest = hashlib.sha256(json.dumps([facts, rule, class_names]).encode()).hexdigest()
    places = sorted({str(task.folder) for task in tasks})
    record = folder / RECORD_NAME
    try:
        known = read_json(record, limit=2**26, what=f"delete {folder} and type the command again")
    except FileNotFoundError:
        known = None
    except NotADirectoryError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from error
    if known is not None:
        if not isinstance(known, dict) or known.get("source") != digest:
            old = known if isinstance(known, dict) else {}
            raise OtherSourceError(
                f"{folder} holds shards that were shrunk from {_listed(old.get('from'))} to "
                f"{_ruled(old.get('rule'))}; now it is {_listed(places)}, {_ruled(rule)}"
                f"{' (its shards or classes have changed)' if _same(old, places, rule) else ''}: "
                "choose another folder, or delete this one"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} exists and holds no shrunk shards; choose a new or empty folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with write_atomically(record) as stream:
            stream.write(json.dumps({"source": digest, "from": places, "rule": rule}).encode())
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from error


def _same(old: dict[str, object], places: list[str], rule: dict[str, object]) -> bool:
    return (old.get("from"), old.get("rule")) == (places, rule)


def _listed(places: object) -> str:
    names = [str(place) for place in places] if isinstance(places, list) else ["another source"]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _ruled(rule: object) -> str:
    facts = rule if isinstance(rule, dict) else {}
    dropped = ", unreadable images left out" if facts.get("drop_unreadable") else ""
    return f"side {facts.get('max_side')}, quality {facts.get('quality')}{dropped}"
