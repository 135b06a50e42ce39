"""Find the images that `zeta finetune` is given, and make shards of them in its run directory.

A run that is refused leaves no shards behind, and a run on other images does not use the shards of
the run before it.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.shards.build import build_shards, build_split
from data_pipeline.shards.folder import OtherSourceError, spec_parts
from data_pipeline.shards.sources.read import open_source
from data_pipeline.shards.sources.table_rows import TABLE_SUFFIXES
from launch.config.load import DEFAULT, Setting
from zeta.exit_codes import RunError
from zeta.run.directory import RunDir

_HELD_OUT = ("val", "valid", "validation", "test")
"""Names of a folder of held-out images beside train/."""


@dataclass(frozen=True)
class Images:
    """Labelled images that the user gave instead of a CONFIG."""

    source: str
    """Path or shards as the user typed them."""
    train: str
    """Folder of images or of shards, or a table of paths."""
    val: str | None
    """Held-out images, if they are in a folder of their own."""
    are_shards: bool


def find_images(source: str) -> Images | None:
    """Return the images or shards that `source` names; None if it is a CONFIG.

    Raises:
        ValueError: `source` is a path that does not exist.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        inside = [name for name in ("train", *_HELD_OUT) if (path / name).is_dir()]
        if inside[:1] == ["train"] and len(inside) > 1 and _holds_sets(path / "train"):
            parts = str(path / "train"), str(path / inside[1])
            return Images(source, *parts, are_shards=_holds_shards(path / "train"))
        return Images(source, str(path), None, are_shards=_holds_shards(path))
    if path.suffix.lower() in TABLE_SUFFIXES:
        return Images(source, str(path), None, are_shards=False)
    if any(part.endswith(".tar") for part in spec_parts(source)):
        return Images(source, source, None, are_shards=True)
    if not path.exists() and len(path.parts) > 1 and path.suffix not in (".yaml", ".yml"):
        raise ValueError(
            f"{source} does not exist; give a folder of images (one folder a class in it), shards, "
            "or a CONFIG"
        )
    return None


def _holds_shards(folder: Path) -> bool:
    return any(folder.glob("*.tar"))


def _holds_sets(folder: Path) -> bool:
    """Return whether a folder train/ is one of several sets, rather than a class of that name."""
    return _holds_shards(folder) or any(path.is_dir() for path in folder.iterdir())


def shard_settings(
    images: Images, run_dir: RunDir, val_share: float, *, launched: bool
) -> list[Setting]:
    """Return the settings of the shards; a folder of images becomes shards in the run directory.

    Raises:
        ValueError: no images with classes, or the run directory has shards of other images.
    """
    train_shards, val_shards = images.train, images.val
    if not images.are_shards:
        if launched:
            raise ValueError(
                f"{images.train} holds images, and several ranks are running: build shards first, "
                "with `zeta shards build IMAGES OUT --val-share 0.1`, and name OUT instead (in a "
                "shell of srun, give --nproc: ranks that are started here are ranks of their own)"
            )
        if not any("cls" in sample.members for sample in open_source(images.train).samples):
            raise ValueError(
                f"the images in {images.train} have no classes: put them into one folder a class, "
                "or give a table of them a column label"
            )
        train_shards, val_shards = _build(images, run_dir, val_share)
    settings: list[Setting] = [(DEFAULT, "data.shards", train_shards)]
    if val_shards is not None:
        settings.append((DEFAULT, "data.val_shards", val_shards))
    return settings


def _build(images: Images, run_dir: RunDir, val_share: float) -> tuple[str, str]:
    """Make shards of a folder of images; return those to train on and those held out."""
    folder = run_dir.shards
    train, val = str(folder / "train"), str(folder / "val")
    try:
        if images.val is None:
            build_split(images.train, folder, val_share, progress=True)
        else:
            build_shards(images.train, train, progress=True)
            build_shards(images.val, val, progress=True)
    except OtherSourceError as error:
        name = f"{run_dir.path.name}-{Path(images.source).absolute().name}"
        another = shlex.quote(f"run.dir={run_dir.path.with_name(name)}")
        raise ValueError(
            f"{run_dir.path} is a run on other images than {images.source}, or on the same images "
            "before they changed, under another path or with another --val-share: choose another "
            f"run directory, as in {another}, or delete {run_dir.path}"
        ) from error
    return train, val


@contextmanager
def shards_go_if_refused(run_dir: RunDir) -> Iterator[None]:
    """Remove the shards that the block makes in a run directory if it ends in a user's error.

    Shards from before stay, as do those of an interrupted build, which continues next time.
    """
    run_there, shards_there = run_dir.path.exists(), run_dir.shards.exists()
    try:
        yield
    except (ValueError, RunError):
        if not shards_there:
            shutil.rmtree(run_dir.shards, ignore_errors=True)
        if not run_there:
            with suppress(OSError):  # it was never made, or it holds something by now
                run_dir.path.rmdir()
        raise
