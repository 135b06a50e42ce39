"""Open what a model can be loaded from: our exports, and published encoders.

A published encoder is read as if it were an export of ours (see `zeta.models.published`), so
whatever takes an export takes it too. This is the one place that tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from zeta.models import exported
from zeta.models.published.reading import is_foreign, open_published
from zeta.stored_tensors import StoredTensor

Model = TypeVar("Model", bound=nn.Module)
_RGB = 3


def read_config(path: Path | str) -> dict[str, Any]:
    """Return config.json of an export, or what it would be for a published encoder.

    Raises:
        ValueError: neither of these, or not one for this version of zeta.
    """
    path = Path(path)
    return open_published(path).config if is_foreign(path) else exported.read_config(path)


def read_image_config(path: Path | str) -> dict[str, Any]:
    """Return config.json as `read_config` does, of a model of RGB images: commands read no others.

    Raises:
        ValueError: as `read_config`, or the model takes another number of channels.
    """
    config = read_config(path)
    channels = config["model"].get("channels", _RGB)
    if channels != _RGB:
        raise ValueError(
            f"{path} takes images of {channels} channels, but images are read as RGB: give a model "
            f"of {_RGB} channels"
        )
    return config


def open_export(path: Path | str) -> dict[str, StoredTensor]:
    """Return the weights of an export or a published encoder by our names, to be read one by one.

    Raises:
        ValueError: neither of these, or some of its files are damaged or missing.
    """
    path = Path(path)
    return open_published(path).tensors if is_foreign(path) else exported.open_export(path)


def load_export(
    path: Path | str, build: Callable[[Mapping[str, Any]], Model], dtype: torch.dtype
) -> Model:
    """Load the model of an export or a published encoder, in evaluation mode, on the CPU.

    Args:
        path: folder of it.
        build: builds the model from `arch` and constructor arguments; called on the meta device.
        dtype: dtype of the weights in memory; the files may have another one.

    Raises:
        ValueError: neither of these, or its weights do not fit its config.
    """
    arguments = read_config(path)["model"]
    stored = open_export(path)  # before the model is built: see `check_depth`
    return exported.load_weights(Path(path), arguments, stored, build, dtype)
