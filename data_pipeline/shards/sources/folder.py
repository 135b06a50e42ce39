"""A folder of images as a source of shards; its subfolders are the classes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath

from data_pipeline.config import warn
from data_pipeline.shards.sample import IMAGE_SUFFIXES
from data_pipeline.shards.sources.sample import (
    FilePart,
    Source,
    SourceSample,
    file_part,
    image_suffix,
    key_of,
    utf8,
)
from data_pipeline.shards.sources.table_rows import refuse_alike

_SPLITS = frozenset(
    ("train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval")
)


def from_folder(folder: Path, labels: bool) -> Source:
    """List the images of a folder; see `data_pipeline.shards.sources.read.open_source`."""
    skipped: Counter[str] = Counter()
    files = [(path.relative_to(folder).parts, path) for path in _walk(folder, skipped)]
    classes = sorted({parts[0] for parts, _ in files if len(parts) > 1}) if labels else []
    if classes:
        _check_classes(folder, classes, [parts for parts, _ in files])
    index = {name: number for number, name in enumerate(classes)}
    samples = []
    for parts, path in files:
        if classes and len(parts) == 1:
            skipped["image beside the class folders, so without a class"] += 1
            continue
        members: dict[str, FilePart | bytes] = {image_suffix(path): file_part(path)}
        if classes:
            members["cls"] = str(index[parts[0]]).encode()
        samples.append(SourceSample(key_of(PurePath(*parts)), members))
    if not samples:
        raise ValueError(
            f"no images found in {folder} ({_summary(skipped)}); it must hold image files "
            f"({', '.join(IMAGE_SUFFIXES[:5])}, ...), or one folder of them per class"
        )
    return Source(samples, tuple(classes) or None, skipped)


def _check_classes(folder: Path, classes: list[str], files: list[tuple[str, ...]]) -> None:
    """Check that the folders of a folder can be its classes; warn of those that hold no image.

    Raises:
        ValueError: they look like the splits of a data set, or a name cannot be written.
    """
    broken = [name for name in classes if utf8(name) != name]
    if broken:
        listed = " and ".join(ascii(os.fsencode(name)) for name in broken[:3])
        raise ValueError(
            f"{folder} has the class folder{'s' * (len(broken) > 1)} {listed}, whose names are "
            "not UTF-8: rename them"
        )
    refuse_alike(classes, str(folder))
    below = {name: {p[1] for p in files if p[0] == name and len(p) > 2} for name in classes}
    splits = [name for name in classes if name.lower() in _SPLITS]
    shared = set.intersection(*(below[name] for name in splits)) if splits else set()
    whole = len(splits) == len(classes) and (len(splits) > 1 or any(below.values()))
    if whole or (len(splits) > 1 and shared):
        raise ValueError(
            f"the folders {', '.join(splits)} of {folder} look like splits of a data set, not like "
            f"classes: build them one by one, as in `zeta shards build {folder / splits[0]} "
            f"OUT/{splits[0]}` (or pass --no-labels)"
        )
    present = {path.name for path in folder.iterdir() if path.is_dir()} - set(classes)
    empty = sorted(name for name in present if not name.startswith("."))
    if empty:
        warn(
            f"{len(empty)} of the folders of {folder} hold no image that can be used, and are no "
            f"classes: {', '.join(map(ascii, empty[:5]))}{', ...' if len(empty) > 5 else ''}"
        )


def unreadable(error: OSError) -> ValueError:
    """Return the error for a folder that cannot be read."""
    return ValueError(
        f"cannot read the folder {error.filename}: {error.strerror}; "
        "make it readable, or move it out of the source"
    )


def _walk(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    """Yield the image files under a folder, sorted; follow links, but visit a folder once."""

    def refuse(error: OSError) -> None:
        raise unreadable(error) from error

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
        for name in hidden:
            images = _count_images(Path(place, name))
            if images:
                warn(
                    f"{images} images in the folder {Path(place, name)} are left out, because its "
                    "name begins with a dot: rename it if they are meant"
                )
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


def _count_images(folder: Path) -> int:
    """Return the number of files under a folder that are images by their names."""
    return sum(
        Path(name).suffix.lower()[1:] in IMAGE_SUFFIXES
        for _, _, files in os.walk(folder)
        for name in files
    )


def _summary(skipped: Counter[str]) -> str:
    found = [f"{count} x {reason}" for reason, count in skipped.most_common() if count]
    return "; ".join(found) or "it is empty"
