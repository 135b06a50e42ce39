"""Trained models on disk: a directory with `model.safetensors` and `config.json`.

The directory is written under a temporary name and renamed when whole, so that what lies under
the final name is complete. No pickle is written or read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zeta.models.config import model_from_arguments

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
TEXT_FILE = "text.safetensors"
TOKENIZER_FILE = "tokenizer.json"
FORMAT = "zeta-1"


@dataclass(frozen=True)
class TextExport:
    """The text encoder of an image-text model, as it goes into an export."""

    arguments: Mapping[str, Any]
    """Constructor arguments of `zeta.models.text_tower.TextTower`, and the `kind` of objective."""
    state_dict: Mapping[str, Tensor]
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
    """Write a model to `out_dir` and return its path.

    Args:
        out_dir: new directory; one that holds an export already is replaced as a whole.
        state_dict: whole (not sharded) weights by parameter name, buffers mean and std included.
        model_arguments: `ModelConfig.resolve()`: arch and constructor arguments.
        info: JSON-able facts to keep with the weights (step, class names, where they come from).
        text: the text encoder that the model, then an image encoder, was trained with.

    Raises:
        ValueError: `out_dir` exists and is no export.
    """
    config = {
        "format": FORMAT,
        "model": dict(model_arguments),
        "preprocessing": preprocessing(state_dict, model_arguments),
        "info": dict(info),
    }
    if text is not None:
        tokenizer = "bytes" if text.tokenizer is None else TOKENIZER_FILE
        config["text"] = {"model": dict(text.arguments), "tokenizer": tokenizer}
    with whole_directory(out_dir) as partial:
        write_weights(partial, state_dict)
        if text is not None:
            write_weights(partial, text.state_dict, TEXT_FILE)
            if text.tokenizer is not None:
                shutil.copyfile(text.tokenizer, partial / TOKENIZER_FILE)
        write_config(partial, config)
    return Path(out_dir)


def load_pretrained(path: Path | str) -> nn.Module:
    """Load the model that `save_pretrained` wrote to the directory `path`, in evaluation mode.

    Raises:
        ValueError: no export there, one of another format, or its weights do not fit its config.
    """
    path = Path(path)
    config = read_config(path)
    with torch.device("meta"):
        model = model_from_arguments(config["model"])
    try:
        model.to_empty(device="cpu").load_state_dict(load_file(path / WEIGHTS_FILE))
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit its {CONFIG_FILE}: {error}") from error
    return model.eval()


def read_config(path: Path | str) -> dict[str, Any]:
    """Return the config.json of an export: format, model, preprocessing, info."""
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{path} is no export: it has no {CONFIG_FILE}; write one: zeta export")
    config = json.loads(file.read_text())
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{file} is not in the format {FORMAT} of zeta: export the model again")
    return config


def preprocessing(
    state_dict: Mapping[str, Tensor], model_arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what an image goes through before the model: mean, std (of [0, 1]) and patch size."""
    return {
        "mean": state_dict["mean"].float().tolist(),
        "std": state_dict["std"].float().tolist(),
        "patch_size": model_arguments["patch_size"],
    }


def write_weights(
    directory: Path, state_dict: Mapping[str, Tensor], name: str = WEIGHTS_FILE
) -> None:
    """Write the tensors as safetensors, contiguous and on the CPU.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    try:
        save_file(tensors, directory / name, metadata={"format": "pt"})
    except SafetensorError as error:  # its own type even for a full disk
        raise OSError(f"{directory / name} cannot be written: {error}") from error


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write config.json."""
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


@contextmanager
def whole_directory(out_dir: Path | str) -> Iterator[Path]:
    """Give a directory to write into that takes the name `out_dir` once the block is through.

    Raises:
        ValueError: `out_dir` exists, is not empty and is not an export and nothing else.
    """
    out_dir = Path(out_dir).absolute()
    if out_dir.is_file():
        raise ValueError(f"{out_dir} is a file: name a directory to write the model to")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not _is_only_an_export(out_dir):
        raise ValueError(f"{out_dir} holds something that is no exported model: name another one")
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
    if there - {TEXT_FILE, TOKENIZER_FILE} != {WEIGHTS_FILE, CONFIG_FILE}:
        return False
    try:
        config = json.loads((directory / CONFIG_FILE).read_text())
    except ValueError:
        return False
    return isinstance(config, dict) and (config.get("format") == FORMAT or "architecture" in config)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
