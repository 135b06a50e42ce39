"""Trained models on disk: a directory with `model.safetensors` and `config.json`.

To load one takes torch, einops and safetensors. No pickle is written or read. The directory is
written under a temporary name and renamed when whole (`zeta.export_folder`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zeta.export_folder import (
    CONFIG_FILE,
    TEXT,
    TOKENIZER_FILE,
    WEIGHTS,
    whole_directory,
    write_config,
)
from zeta.models.config import model_from_arguments
from zeta.run_dir import RunDir
from zeta.run_places import find_run
from zeta.stored_tensors import StoredTensor, in_memory, write_safetensors, write_sharded

MAX_FILE_BYTES = 5 * 10**9
"""Weights beyond this are written as several files, by default."""
_VERSION = 1
FORMAT = f"zeta-{_VERSION}"
_MODEL_KEYS = ("arch", "image_size", "patch_size", "num_classes", "dim")
"""What every model has."""


@dataclass(frozen=True)
class TextExport:
    """The text encoder of an image-text model, as it goes into an export."""

    arguments: Mapping[str, Any]
    """Constructor arguments of `zeta.models.text_tower.TextTower`, and the `kind` of objective."""
    tensors: Mapping[str, StoredTensor]
    """Weights of the text tower under `text.`, of scale and bias under `logits.`."""
    tokenizer: Path | None
    """The tokenizer.json; None: bytes."""


def save_pretrained(
    out_dir: Path | str,
    state_dict: Mapping[str, Tensor],
    model_arguments: Mapping[str, Any],
    info: Mapping[str, Any],
    text: TextExport | None = None,
) -> Path:
    """Write a model that is in memory to `out_dir` and return its path.

    Args:
        out_dir: new directory; one that holds an export already is replaced as a whole.
        state_dict: whole (not sharded) weights by parameter name, buffers mean and std included.
        model_arguments: `ModelConfig.resolve()`: arch and constructor arguments.
        info: JSON-able facts to keep with the weights (step, class names, where they come from).
        text: the text encoder that the model, then an image encoder, was trained with.

    Raises:
        ValueError: `out_dir` exists and is no export.
    """
    with whole_directory(out_dir) as partial:
        tensors = in_memory(state_dict)
        write_config(partial, write_model(partial, tensors, model_arguments, info, text=text))
    return Path(out_dir)


def write_model(
    directory: Path,
    tensors: Mapping[str, StoredTensor],
    model_arguments: Mapping[str, Any],
    info: Mapping[str, Any],
    *,
    resolution: Mapping[str, Any] | None = None,
    text: TextExport | None = None,
    stem: str = WEIGHTS,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> dict[str, Any]:
    """Write the weights of a model to `directory`, one at a time; return what config.json holds.

    Args:
        directory: exists.
        tensors: weights by parameter name, buffers mean and std included.
        model_arguments: `ModelConfig.resolve()`: arch and constructor arguments.
        info: JSON-able facts to keep with the weights (step, class names, where they come from).
        resolution: what sizes the images had in training.
        text: the text encoder that the model, then an image encoder, was trained with.
        stem: name of the files of weights, without their ending.
        max_file_bytes: weights beyond this are written as several files.
    """
    config: dict[str, Any] = {
        "format": FORMAT,
        "model": dict(model_arguments),
        "preprocessing": preprocessing(tensors, model_arguments),
        "info": dict(info),
    }
    if stem != WEIGHTS:
        config["weights"] = stem
    if resolution is not None:
        config["preprocessing"]["resolution"] = dict(resolution)
    write_sharded(directory, stem, tensors, max_file_bytes)
    if text is not None:
        tokenizer = "bytes" if text.tokenizer is None else TOKENIZER_FILE
        config["text"] = {"model": dict(text.arguments), "tokenizer": tokenizer}
        write_safetensors(directory / f"{TEXT}.safetensors", text.tensors)
        if text.tokenizer is not None:
            shutil.copyfile(text.tokenizer, directory / TOKENIZER_FILE)
    return config


def load_pretrained(path: Path | str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load the model that an export holds for zeta, in evaluation mode, on the CPU.

    Args:
        path: folder of the export.
        dtype: of the weights in memory, whatever it is in the files.

    Raises:
        ValueError: no export there, one of another format, or its weights do not fit its config.
    """
    path = Path(path)
    arguments = read_config(path)["model"]
    try:
        with torch.device("meta"):
            model = model_from_arguments(arguments).to(dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the model in {path / CONFIG_FILE} cannot be built: {error}; if a newer zeta wrote "
            "it, upgrade zeta"
        ) from error
    stored = open_export(path)
    _check_fit(path, model, stored)
    with torch.no_grad():
        for name, tensor in model.to_empty(device="cpu").state_dict().items():
            tensor.copy_(stored[name].read())
    return model.eval()


def read_config(path: Path | str) -> dict[str, Any]:
    """Return the config.json of an export: format, model, preprocessing, info.

    Raises:
        ValueError: no export there, or none for this version of zeta.
    """
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        raise ValueError(_no_export(Path(path)))
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): export the model again") from error
    form = config.get("format") if isinstance(config, dict) else None
    if isinstance(config, dict) and form == FORMAT:
        for key in ("model", "info"):
            if not isinstance(config.get(key), dict):
                raise ValueError(f"{file} is damaged: it has no {key}; export the model again")
        if missing := [key for key in _MODEL_KEYS if key not in config["model"]]:
            raise ValueError(
                f"{file} is damaged: its model has no {missing[0]}; export the model again"
            )
        return config
    version = re.fullmatch(r"zeta-(\d+)", str(form))
    if version and int(version[1]) > _VERSION:
        raise ValueError(
            f"{path} was exported by a newer zeta, in the format {form}; this one reads {FORMAT}: "
            "upgrade zeta"
        )
    if form is None and isinstance(config, dict) and "architecture" in config:
        raise ValueError(
            f"{file} is not in the format {FORMAT} of zeta but in that of timm: load it with "
            f'timm.create_model("local-dir:{path}", pretrained=True), or export the model with '
            "--format zeta"
        )
    raise ValueError(f"{file} is not in the format {FORMAT} of zeta: export the model again")


def _no_export(path: Path) -> str:
    """Say what a path is that holds no export, and what to give instead."""
    if not path.exists():
        return f"{path} does not exist; give a folder that `zeta export` wrote"
    if not path.is_dir():
        return f"{path} is a file; give the folder that `zeta export` wrote"
    place = find_run(path)
    if place is None:
        return f"{path} is no export: it has no {CONFIG_FILE}; write one: zeta export"
    exported = RunDir(place.run).exported
    there = f", or give {exported}" if (exported / CONFIG_FILE).is_file() else ""
    return f"{path} is {place.what}, not an export: write one with `{place.export_command}`{there}"


def open_export(path: Path | str) -> dict[str, StoredTensor]:
    """Return the weights that an export holds for zeta, to be read one at a time.

    Raises:
        ValueError: no export there, or one whose files are damaged or missing.
    """
    path = Path(path)
    stem = read_config(path).get("weights", WEIGHTS)
    index = path / f"{stem}.safetensors.index.json"
    files = [f"{stem}.safetensors"]
    try:
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            tensors |= open_safetensors(path / file)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a whole export ({error}): export again") from error
    return tensors


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file, to be read one at a time.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    try:
        file: Any = safe_open(path, framework="pt")  # the library has no types
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing") from error
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    names: list[str] = file.keys()
    return {name: _stored(file, name) for name in names}


def _stored(file: Any, name: str) -> StoredTensor:
    part = file.get_slice(name)
    dtypes = {"F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}
    dtype = dtypes.get(part.get_dtype(), torch.float32)
    return StoredTensor(tuple(part.get_shape()), dtype, lambda: file.get_tensor(name))


def preprocessing(
    tensors: Mapping[str, StoredTensor], model_arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what an image goes through before the model: mean, std (of [0, 1]) and patch size."""
    return {
        "mean": tensors["mean"].read().float().tolist(),
        "std": tensors["std"].read().float().tolist(),
        "channels": model_arguments.get("channels", 3),
        "patch_size": model_arguments["patch_size"],
    }


def _check_fit(path: Path, model: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = {name: tensor.shape for name, tensor in stored.items()}
    different = [name for name in sorted({*wanted, *there}) if wanted.get(name) != there.get(name)]
    if different:
        name, more = different[0], len(different) - 1
        raise ValueError(
            f"the weights in {path} do not fit its {CONFIG_FILE}: {name} is "
            f"{there.get(name, 'absent')} and should be {wanted.get(name, 'absent')}"
            f"{f', and {more} more' if more else ''}; export the model again"
        )
