"""The folder of an export: whole or absent, and replaced only where it holds nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WEIGHTS = "model"
"""Stem of the files of weights."""
ZETA_WEIGHTS = "zeta"
"""That of the weights for zeta where those for timm lie beside them."""
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
TEXT = "text"
"""Stem of the file of a text encoder's weights."""
TOKENIZER_FILE = "tokenizer.json"

_STEMS = f"({WEIGHTS}|{ZETA_WEIGHTS}|{TEXT})"
_OURS = re.compile(
    rf"{_STEMS}(-\d+-of-\d+)?\.safetensors|{_STEMS}\.safetensors\.index\.json"
    rf"|{CONFIG_FILE}|{CARD_FILE}|{TOKENIZER_FILE}"
)


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write config.json."""
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def check_free(out_dir: Path | str) -> None:
    """Raise ValueError if `out_dir` may not be written: it is not empty and not an export alone."""
    out_dir = Path(out_dir)
    if out_dir.is_file():
        raise ValueError(f"{out_dir} is a file: name a directory to write the model to")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not _is_only_an_export(out_dir):
        raise ValueError(f"{out_dir} holds something that is no exported model: name another one")


@contextmanager
def whole_directory(out_dir: Path | str) -> Iterator[Path]:
    """Give a directory to write into that takes the name `out_dir` once the block is through.

    Raises:
        ValueError: `out_dir` exists, is not empty and is not an export and nothing else.
    """
    check_free(out_dir)
    out_dir = Path(out_dir).resolve()  # a link stays, and what it leads to is replaced
    partial = out_dir.with_name(f".tmp-{out_dir.name}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.iterdir():
            _sync(file)
        if out_dir.exists():
            old = out_dir.with_name(f".tmp-{out_dir.name}-{os.getpid()}-old")
            out_dir.rename(old)
            partial.rename(out_dir)
            shutil.rmtree(old)
        else:
            partial.rename(out_dir)
        _sync(out_dir.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_only_an_export(directory: Path) -> bool:
    """Whether all that is there was written by an export, in our format or timm's.

    The directory is replaced as a whole, so a file more would be lost, and a config.json alone may
    be anybody's.
    """
    there = {path.name for path in directory.iterdir()}
    has_weights = any(name.startswith((WEIGHTS, ZETA_WEIGHTS)) for name in there)
    if CONFIG_FILE not in there or not has_weights or not all(map(_OURS.fullmatch, there)):
        return False
    try:
        config = json.loads((directory / CONFIG_FILE).read_text())
    except ValueError:
        return False
    if not isinstance(config, dict):
        return False
    return str(config.get("format")).startswith("zeta-") or "architecture" in config


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
