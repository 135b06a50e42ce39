"""Write trained models: `model.safetensors` and `config.json` in one directory, whole or absent."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from zeta.export.folder import whole_directory, write_config
from zeta.models.pretrained import FORMAT, TEXT, TOKENIZER_FILE, WEIGHTS
from zeta.stored_tensors import StoredTensor, in_memory, write_safetensors, write_sharded

MAX_FILE_BYTES = 5 * 10**9
"""Weights beyond this are written as several files, by default."""


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
