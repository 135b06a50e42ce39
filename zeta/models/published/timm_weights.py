"""The weights of a plain ViT of timm and its config.json, checked whichever command opens them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from zeta.models.arguments import IMAGENET_MEAN, IMAGENET_STD
from zeta.models.exported import CONFIG_FILE
from zeta.models.published.asking_timm import with_told_options
from zeta.models.published.classes import class_names
from zeta.models.published.files import naming, open_folder
from zeta.models.published.pixels import Pixels, pixels_of, usual_pixels
from zeta.models.published.tensors import check_floats
from zeta.stored_tensors import StoredTensor, in_memory

USUAL = (IMAGENET_MEAN, IMAGENET_STD)
"""Usual mean and std of the pixels."""


@dataclass(frozen=True)
class TimmWeights:
    """Weights of a published model and its config.json."""

    tensors: Mapping[str, StoredTensor]
    """Weights by their published names."""
    config: Mapping[str, Any]
    """Content of config.json; empty without one."""
    mean_std: Pixels | None = None
    """Mean and std that the files give; None: those of its class."""
    notes: tuple[str, ...] = ()
    """What is assumed of them, in sentences."""

    def option(self, *names: str) -> Any:
        """Return the value of the first of `names` that the config has, else None."""
        places = [self.config.get(key) or {} for key in ("model_args", "vision_config")]
        values = (place.get(name) for place in (*places, self.config) for name in names)
        return next((value for value in values if value is not None), None)

    def pixels(self, channels: int) -> dict[str, tuple[float, ...]]:
        """Return mean and std that pixels are normalised with; the usual ones if not given."""
        mean, std = self.mean_std or usual_pixels(USUAL, channels, self.tensors)
        return {"mean": mean, "std": std}


def open_timm(source: Path | str | Mapping[str, Tensor]) -> TimmWeights:
    """Open the weights of a plain ViT of timm, to be read one at a time.

    Raises:
        ValueError: no weights there, damaged ones, those of an export of zeta, options that NaViT
            does not have, or an image processor or classes that contradict them.
    """
    if isinstance(source, Mapping):
        return checked({}, in_memory(source))
    path = Path(source)
    with naming(path):
        folder = open_folder(path)
        check_floats(folder.tensors)
        weights = checked(folder.config, folder.tensors)
        head = folder.tensors.get("head.weight")
        class_names(folder.config, folder.tensors, None if head is None else head.shape[0])
        channels, patch = patch_of(weights)
        notes = list(weights.notes)
        found = pixels_of(folder, USUAL, {"channels": channels, "patch_size": patch}, notes)
        return replace(weights, mean_std=found, notes=tuple(notes))


def checked(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> TimmWeights:
    """Return the weights with the options that timm tells, and what is assumed without a config.

    Args:
        config: content of config.json; empty without one.
        tensors: weights by their published names.

    Raises:
        ValueError: weights of an export of zeta, or an option that NaViT does not have.
    """
    if "mean" in tensors and "std" in tensors:
        raise ValueError(
            f"these are weights of an export of zeta whose {CONFIG_FILE} is missing or damaged: "
            "export the model again"
        )
    weights = TimmWeights(tensors, with_told_options(config, tensors))
    if config:
        return weights
    note = (
        f"there is no {CONFIG_FILE}: {activation(weights)}, norms with an epsilon of 1e-6, and the "
        "usual mean and std are assumed"
    )
    return replace(weights, notes=(note,))


def activation(weights: TimmWeights) -> str:
    """Return NaViT's name of the activation of MLPs; gelu where nothing tells it."""
    given = str(weights.option("act_layer", "hidden_act"))
    if "tanh" in given:
        return "gelu_tanh"
    return given if given in ("quick_gelu", "silu") else "gelu"


def patch_of(weights: TimmWeights) -> tuple[int, int]:
    """Return the channels of an image and the side of a patch."""
    for name, kernel in weights.tensors.items():
        if name.endswith(("embed.proj.weight", "embeds.proj.weight", "patch_embedding.weight")):
            if len(kernel.shape) == 4:
                return kernel.shape[1], kernel.shape[2]
            channels = weights.option("in_chans", "num_channels") or 3
            return channels, math.isqrt(kernel.shape[1] // channels)
    raise ValueError("the weights have no patch embedding: they are not those of a ViT")


def told_grid(weights: TimmWeights) -> tuple[int, int] | None:
    """Return the grid of a flat position table, where config.json or timm tells it."""
    if "pos_embed" not in weights.tensors:
        return None
    grid = weights.option("pos_embed_grid_size")
    if grid is None:
        _, patch = patch_of(weights)
        return grid_of((weights.config.get("model_args") or {}).get("img_size"), patch)
    return int(grid[0]), int(grid[1])


def grid_of(image_size: Any, patch: int) -> tuple[int, int] | None:
    """Return (h, w) in patches of a side, or (height, width), in pixels; None of None."""
    if image_size is None:
        return None
    height, width = [image_size] * 2 if isinstance(image_size, int) else image_size
    return height // patch, width // patch
