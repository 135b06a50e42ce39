"""Read exported models: a directory with `model.safetensors` and `config.json`.

Loading needs torch, einops and safetensors. No pickle is written or read.
`zeta.export.saving` writes the directory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from zeta.files import read_json
from zeta.models.export_checks import AGAIN, check_config, check_depth, check_file
from zeta.run.directory import RunDir
from zeta.run.places import find_run
from zeta.stored_tensors import StoredTensor

WEIGHTS = "model"
"""Stem of the files of weights."""
ZETA_WEIGHTS = "zeta"
"""Stem of the weights for zeta if weights in another format are beside them."""
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
TEXT = "text"
"""Stem of the file of a text encoder's weights."""
TOKENIZER_FILE = "tokenizer.json"
FITS = ("keep", "crop", "squash")
"""Ways in which an image gets the shape that a model takes, see `data.resolution.fit`."""
_VERSION = 1
FORMAT = f"zeta-{_VERSION}"
MOST_BYTES = 2**28
"""Most bytes of a JSON file in an export, most of which are names of classes."""
_PART = re.compile(rf"({WEIGHTS}|{ZETA_WEIGHTS})-\d+-of-\d+\.safetensors")
_CANNOT_BUILD = (TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError, KeyError)
"""Errors of a model's constructor on arguments that no config of ours would hold."""
_MODEL_KEYS = ("arch", "image_size", "patch_size", "num_classes", "dim")
"""Keys that every model has."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Types by their names in safetensors; weights are of the first four."""
Model = TypeVar("Model", bound=nn.Module)


def load_weights(
    path: Path,
    arguments: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    build: Callable[[Mapping[str, Any]], Model],
    dtype: torch.dtype,
) -> Model:
    """Build a model and load its weights, in evaluation mode, on the CPU.

    Args:
        path: folder that they come from, for messages.
        arguments: `arch` and constructor arguments.
        stored: the weights by name.
        build: builds the model from `arguments`; called on the meta device.
        dtype: dtype of the weights in memory; the files may have another one.

    Raises:
        ValueError: the weights do not fit the arguments.
    """
    model = check_weights(path, arguments, stored, build).to(dtype)
    with torch.no_grad():
        for name, tensor in model.to_empty(device="cpu").state_dict().items():
            tensor.copy_(stored[name].read())
    return model.eval()


def check_weights(
    path: Path,
    arguments: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    build: Callable[[Mapping[str, Any]], Model],
) -> Model:
    """Return the model on the meta device, once names and shapes of its weights are as it needs.

    Raises:
        ValueError: the weights do not fit the arguments.
    """
    try:
        with torch.device("meta"):
            model = build(arguments)
    except _CANNOT_BUILD as error:
        raise ValueError(
            f"the model in {path / CONFIG_FILE} cannot be built: {error}; if a newer zeta wrote "
            "it, upgrade zeta"
        ) from error
    _check_fit(path, model, stored)
    return model


def read_config(path: Path | str) -> dict[str, Any]:
    """Return the config.json of an export: format, model, preprocessing, info.

    Raises:
        ValueError: not an export, or not one for this version of zeta.
    """
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        raise ValueError(_no_export(Path(path)))
    config = read_json(file, limit=MOST_BYTES, what=AGAIN)
    form = config.get("format") if isinstance(config, dict) else None
    if isinstance(config, dict) and form == FORMAT:
        for key in ("model", "info"):
            if not isinstance(config.get(key), dict):
                raise ValueError(f"{file} is damaged: it has no {key}; export the model again")
        if missing := [key for key in _MODEL_KEYS if key not in config["model"]]:
            raise ValueError(
                f"{file} is damaged: its model has no {missing[0]}; export the model again"
            )
        check_config(file, config)
        return config
    version = re.fullmatch(r"zeta-(\d+)", str(form))
    if version and int(version[1]) > _VERSION:
        raise ValueError(
            f"{path} was exported by a newer zeta, in the format {form}; this one reads {FORMAT}: "
            "upgrade zeta"
        )
    raise ValueError(f"{file} is not in the format {FORMAT} of zeta: export the model again")


def remember_training(model: Any, config: Mapping[str, Any]) -> None:
    """Tell a `zeta.models.packed_vit.PackedViT` what config.json says of the images it learned."""
    trained = config["info"].get("resolution")
    trained = trained if isinstance(trained, dict) else {}
    side, upscale = trained.get("max"), trained.get("max_upscale")
    model.fit = trained_fit(config) or model.fit
    model.class_names = class_names(config)
    if isinstance(side, int) and side >= 1:
        model.trained_side = side
    if isinstance(upscale, int | float) and upscale >= 1:
        model.max_upscale = float(upscale)


def class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names of a model's classes, by index, from config.json; None: not known."""
    names = config["info"].get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def trained_fit(config: Mapping[str, Any]) -> str | None:
    """Return `data.resolution.fit` of the training from config.json; None where it is not kept."""
    resolution = config["info"].get("resolution")
    fit = resolution.get("fit") if isinstance(resolution, dict) else None
    return fit if fit in FITS else None


def _no_export(path: Path) -> str:
    """Describe a path that is not an export, and name the path or command to use instead."""
    if not path.exists():
        return (
            f"{path} does not exist; give a folder that `zeta export` or `zeta import` wrote, or "
            "one of transformers or timm (a model of a hub must be downloaded into a folder first)"
        )
    if not path.is_dir():
        return f"{path} is a file; give the folder that `zeta export` wrote"
    place = find_run(path)
    if place is None:
        return f"{path} is not an export: it has no {CONFIG_FILE}; write one: zeta export"
    exported = RunDir(place.run).exported
    there = f", or give {exported}" if (exported / CONFIG_FILE).is_file() else ""
    return f"{path} is {place.what}, not an export: write one with `{place.export_command}`{there}"


def open_export(path: Path | str) -> dict[str, StoredTensor]:
    """Return the zeta weights of an export, to be read one at a time.

    Raises:
        ValueError: not an export, or some of its files are damaged or missing.
    """
    path = Path(path)
    config = read_config(path)
    tensors: dict[str, StoredTensor] = {}
    try:
        for file in _weight_files(path, config):
            check_file(path / file, config)
            tensors |= open_safetensors(path / file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole export ({error}): export again") from error
    check_depth(path, config["model"], tensors)
    return tensors


def _weight_files(path: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the names of the files of weights, from their index if there are several."""
    stem = config.get("weights", WEIGHTS)
    if stem not in (WEIGHTS, ZETA_WEIGHTS):
        raise ValueError(f"weights is {str(stem)[:40]!r} in {CONFIG_FILE}")
    index = path / f"{stem}.safetensors.index.json"
    if not index.is_file():
        name = f"{stem}.safetensors"
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        return [name]
    check_file(index, config)
    content = read_json(index, limit=MOST_BYTES, what=AGAIN)
    listed = content.get("weight_map") if isinstance(content, dict) else None
    names = sorted(set(listed.values())) if isinstance(listed, dict) else []
    if not names or not all(_PART.fullmatch(str(name)) for name in names):  # never a path
        raise ValueError(f"{index.name} lists no files of weights")
    for name in names:
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
    return names


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file, to be read one at a time.

    Raises:
        ValueError: the file is missing or damaged.
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
    dtype = _DTYPES.get(part.get_dtype())
    if dtype is None:
        known = ", ".join(_DTYPES)
        raise ValueError(f"{name} is of type {part.get_dtype()}: zeta knows {known}")
    return StoredTensor(tuple(part.get_shape()), dtype, lambda: file.get_tensor(name))


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
