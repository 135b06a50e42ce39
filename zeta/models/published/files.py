"""Find the weights and the configs of a published model in its folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zeta.files import read_json
from zeta.models.export_checks import check_file
from zeta.models.exported import CONFIG_FILE, open_safetensors
from zeta.stored_tensors import StoredTensor

AGAIN = "download it again"
_MOST_BYTES = 2**28
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PART = re.compile(r"model-\d+-of-\d+\.safetensors")
_KINDS = {"model_type", "architecture"}
"""Keys of config.json that say what the weights are."""
_PIPELINE = "model_index.json"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Folder:
    """The folder of a published model."""

    path: Path
    config: Mapping[str, Any]
    """Content of config.json; empty without one."""
    processor: Mapping[str, Any] | None
    """Settings of its image processor; None: there are none."""
    tensors: Mapping[str, StoredTensor]
    """Weights by their published names."""


def read_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: it holds something else.
    """
    content = read_json(file, limit=_MOST_BYTES, what=AGAIN)
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it holds no object; {AGAIN}")
    return content


def open_folder(path: Path) -> Folder:
    """Open the folder of one published model, or its file of weights; these are read later.

    Raises:
        ValueError: no weights, several models, or damaged or missing files; by name.
    """
    if path.is_file():
        return Folder(path, {}, None, open_safetensors(path))
    file = path / CONFIG_FILE
    config = read_object(file) if file.is_file() else {}
    if file.is_file() and not _KINDS & config.keys():
        raise ValueError(
            f"{file} has no model_type, as of transformers, and no architecture, as of timm: it is "
            f"not of a published encoder; {AGAIN}"
        )
    tensors: dict[str, StoredTensor] = {}
    for name in _weight_files(path):
        check_file(path / name, config)  # where zeta exported them
        part = open_safetensors(path / name)
        if twice := sorted(tensors.keys() & part.keys()):
            raise ValueError(f"it has {twice[0]} in two of its files: {AGAIN}")
        tensors |= part
    return Folder(path, config, _processor(path), tensors)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the path in every refusal of what lies there."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} cannot be read: config.json is damaged ({error!r})") from error
    except ValueError as error:
        if str(error).startswith(f"{path}/"):  # a file in it; "vit" alone is in many sentences
            raise
        raise ValueError(f"{path} cannot be read: {error}") from error


def has_weights(path: Path) -> bool:
    """Return whether a folder holds weights in the files that transformers and timm write."""
    return (path / _WEIGHTS).is_file() or (path / _INDEX).is_file()


def _processor(path: Path) -> dict[str, Any] | None:
    for name in _PROCESSORS:
        if (path / name).is_file():
            content = read_object(path / name)
            inner = content.get("image_processor", content)
            return inner if isinstance(inner, dict) else content
    return None


def _weight_files(path: Path) -> list[str]:
    if (path / _PIPELINE).is_file():
        raise ValueError(
            f"it is a pipeline of several models ({_PIPELINE}): give the folder of one of them"
        )
    there = sorted(file.name for file in path.glob("*.safetensors"))
    index = path / _INDEX
    wanted = [_WEIGHTS]
    if index.is_file():
        listed = read_object(index).get("weight_map")
        names = sorted(set(listed.values())) if isinstance(listed, dict) else []
        if not names or not all(_PART.fullmatch(str(name)) for name in names):  # never a path
            raise ValueError(f"{index} lists no files of weights: {AGAIN}")
        wanted = names
    if missing := [name for name in wanted if name not in there]:
        if not there and list(path.glob("*.bin")):
            raise ValueError(
                "it has its weights as pickles (.bin), which zeta does not read: save the model "
                "again with safe_serialization=True"
            )
        raise ValueError(f"it lacks {missing[0]}: {AGAIN}")
    if others := [name for name in there if name not in wanted]:
        raise ValueError(
            f"it holds weights of several models ({wanted[0]} and {others[0]}): move "
            "those that are not meant to another folder"
        )
    return wanted
