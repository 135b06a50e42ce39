"""Check what an export says of itself, before anything of the size that it names is built or read.

config.json keeps the SHA-256 of every other file (`sha256`: name to hex digits): a file that was
changed by a disk or on the way would load as other weights. Exports older than that have none.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

CHECKSUMS = "sha256"
"""Key of config.json."""
AGAIN = "export the model again"
"""What to do about a damaged export."""
_WHOLE_NUMBERS = (
    "patch_size",
    "num_classes",
    "dim",
    "depth",
    "heads",
    "mlp_dim",
    "channels",
    "dim_head",
    "registers",
    "vocab_size",
    "max_tokens",
    "embed_dim",
)
_MOST = 2**31
"""Bound of every size in a model: far more than any file holds, and no overflow in torch."""
_BLOCK = re.compile(r"(?:.*\.)?blocks\.(\d+)\.")


def checksums(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of an export that is being written, hidden ones left out."""
    files = [path for path in directory.iterdir() if path.is_file()]
    return {path.name: _sha256(path) for path in sorted(files) if not path.name.startswith(".")}


def check_file(path: Path, config: Mapping[str, Any]) -> None:
    """Compare a file of an export with its checksum; 1.2 GB a second were measured on one core.

    Args:
        path: the file, beside config.json.
        config: content of config.json; nothing is compared if it has no checksum of the file.

    Raises:
        ValueError: the content has changed since it was exported.
        OSError: the file cannot be read.
    """
    known = config.get(CHECKSUMS)
    expected = known.get(path.name) if isinstance(known, dict) else None
    if expected is not None and _sha256(path) != expected:
        raise ValueError(
            f"{path.name} is damaged: its content is not what was exported (SHA-256 in config.json)"
        )


def check_config(file: Path, config: Mapping[str, Any]) -> None:
    """Check the types in config.json that loading, evaluation and fine-tuning rely on.

    Args:
        file: config.json, for messages.
        config: its content, with a `model` and `info`.

    Raises:
        ValueError: a value of another type or beyond any model; names it.
    """
    check_arguments(file, config["model"])
    size = config["model"]["image_size"]
    sides = size if isinstance(size, list) else [size]
    if not (len(sides) in (1, 2) and all(map(_is_size, sides))):
        _refuse(file, "model.image_size", size)
    mappings = {"preprocessing": config, "resolution": config["info"]}
    for key, holder in mappings.items():
        if not isinstance(holder.get(key), dict | None):
            _refuse(file, key, holder[key])
    names = config["info"].get("class_names")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        _refuse(file, "info.class_names", names)


def check_arguments(file: Path, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError unless the sizes in the arguments of a model or text encoder are sizes."""
    for key in _WHOLE_NUMBERS:
        value = arguments.get(key)
        least = 0 if key == "registers" else 1
        if value is not None and not (_is_size(value) or (value == 0 == least)):
            _refuse(file, f"model.{key}", value)


def check_depth(path: Path, arguments: Mapping[str, Any], names: Collection[str]) -> None:
    """Raise ValueError unless the weights have as many blocks as config.json says.

    Each block is an object: an endless number of them would be built before they are compared.

    Args:
        path: folder of the export, for messages.
        arguments: constructor arguments, with `depth`.
        names: names of all tensors.
    """
    there = {int(match[1][:9]) for name in names if (match := _BLOCK.match(name))}
    if len(there) != arguments.get("depth"):
        raise ValueError(
            f"the weights in {path} do not fit its config.json: they are of {len(there)} blocks, "
            f"and model.depth is {str(arguments.get('depth'))[:40]}; {AGAIN}"
        )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < _MOST


def _refuse(file: Path, key: str, value: object) -> None:
    raise ValueError(f"{file} is damaged ({key} is {repr(value)[:60]}); {AGAIN}")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
