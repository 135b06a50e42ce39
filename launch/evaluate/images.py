"""Open the images that `zeta predict`, `embed` and `eval` are given: shards, folders or files.

Images that are not in shards are copied into shards in a temporary folder, so that they take the
same way through the pipeline as in training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.shards.build import build_shards
from data_pipeline.shards.folder import spec_parts
from data_pipeline.shards.manifest_files import REJECTED_NAME
from data_pipeline.shards.sample import IMAGE_SUFFIXES
from data_pipeline.shards.sources.read import open_source
from data_pipeline.shards.sources.sample import FilePart
from data_pipeline.shards.sources.table_rows import TABLE_SUFFIXES
from launch.errors import message
from launch.evaluate.features import shared_folder
from zeta.distributed import World
from zeta.exit_codes import RunError


@dataclass(frozen=True)
class OpenedImages:
    """Images as shards, and the files that they came from."""

    shards: Sequence[str]
    """Shards, as for `data.shards`."""
    files: Sequence[str] | None = None
    """File of each image, by its sample id; None: the images were in shards."""


def are_shards(sources: Sequence[str]) -> bool:
    """Return whether all sources are shards, and none is a folder of images, a table or a file.

    Raises:
        ValueError: some are and some are not.
    """
    found = [_is_shards(source) for source in sources]
    if any(found) and not all(found):
        one, other = sources[found.index(True)], sources[found.index(False)]
        raise ValueError(
            f"{one} is shards and {other} is images: type one command for each, or build shards "
            f"of the images, with `zeta shards build {other} OUT`"
        )
    return all(found)


def _is_shards(source: str) -> bool:
    path = Path(source)
    if path.is_dir():
        return any(path.glob("*.tar"))
    suffix = path.suffix.lower()
    if path.is_file() and suffix != ".tar":
        if suffix in TABLE_SUFFIXES or suffix[1:] in IMAGE_SUFFIXES:
            return False
        raise ValueError(
            f"{source} is not an image by its name: give files such as .jpg or .png, a folder of "
            "them, a .csv or .jsonl table of paths, or shards"
        )
    if not path.exists() and not any(".tar" in part for part in spec_parts(source)):
        raise ValueError(
            f"{source} does not exist: give a folder of images, images, a .csv or .jsonl table of "
            "paths, or shards"
        )
    return True


@contextmanager
def as_shards(
    sources: Sequence[str], world: World, *, labels: bool, workers: int = 1
) -> Iterator[OpenedImages]:
    """Yield the images as shards; those that are none are copied, for the time of the block.

    Every rank calls this. The copies lie in rank 0's $TMPDIR, in the order of the sources.

    Args:
        sources: shards; or folders of images, tables of paths, and image files.
        world: the ranks.
        labels: whether the subfolders of a folder are classes.
        workers: processes that copy.

    Raises:
        ValueError: a source does not exist, or holds no image that can be used.
    """
    if are_shards(sources):
        yield OpenedImages(list(sources))
        return
    with shared_folder(world) as folder:
        opened: OpenedImages | None = None
        failure: Exception | None = None
        if world.is_main:
            try:
                opened = _copied(sources, folder, labels=labels, workers=max(1, workers))
            except (ValueError, OSError, RunError) as error:
                failure = error if world.size == 1 else RunError(message(error))
        if not world.all(failure is None):
            world.raise_together(failure)
        found: OpenedImages = world.broadcast(opened)
        yield found
        world.barrier()  # NOTE: the copies are deleted once no rank reads them


def _copied(sources: Sequence[str], folder: Path, *, labels: bool, workers: int) -> OpenedImages:
    """Write the images as shards into `folder`, in their order."""
    groups = [source for source in sources if not _is_image(source)]
    alone = [source for source in sources if _is_image(source)]
    as_given = {str(Path(source).absolute()): source for source in alone}
    roots: dict[str, str | None] = dict.fromkeys(groups)
    if alone:
        table = folder / "files.jsonl"
        lines = [
            json.dumps({"path": str(Path(source).absolute()), "label": None}) for source in alone
        ]
        table.write_text("".join(f"{line}\n" for line in lines))
        roots[str(table)] = "/"
    shards, files = list[str](), list[str]()
    for number, (source, root) in enumerate(roots.items()):
        copied = folder / f"{number:04d}"
        opened = open_source(source, labels=labels, root=root)
        found = (
            next((part.path for part in sample.members.values() if isinstance(part, FilePart)), "")
            for sample in opened.samples
        )
        files += [as_given.get(path, path) for path in found]
        try:
            build_shards(
                source, copied, seed=None, labels=labels, root=root, workers=workers, progress=True
            )
        except ValueError as error:
            if not (copied / REJECTED_NAME).is_file():
                raise
            raise ValueError(_all_bad(source if root is None else alone[0], copied)) from error
        shards.append(str(copied))
    return OpenedImages(shards, files)


def _is_image(source: str) -> bool:
    return Path(source).is_file() and Path(source).suffix.lower()[1:] in IMAGE_SUFFIXES


def _all_bad(source: str, copied: Path) -> str:
    """Return the message about images none of which can be used."""
    lines = (copied / REJECTED_NAME).read_text().splitlines()
    first = json.loads(lines[0]).get("reason") if lines else "it is empty"
    return f"none of the {len(lines):,} images of {source} can be used; the first: {first}"
