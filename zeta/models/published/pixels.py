"""How a published model wants its pixels: from its image processor, or timm's `pretrained_cfg`.

One that contradicts the weights, or the other, is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from zeta.models.published.files import Folder
from zeta.models.published.timm_names import TOWER

_HALF = 0.5
_ALMOST = 1e-3
"""Means and standard deviations nearer than this are the same, written with fewer digits."""
_NOT_OF_THIS_MODEL = "one of the two files is not of this model"
Pixels = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and std of the channels of pixels in [0, 1]."""


def pixels_of(
    folder: Folder, usual: Pixels, arguments: Mapping[str, Any], notes: list[str]
) -> Pixels:
    """Return mean and std that the pixels are normalised with.

    Args:
        folder: the published model.
        usual: mean and std of its class, for three channels.
        arguments: those of the NaViT.
        notes: takes a sentence where mean and std are assumed.

    Raises:
        ValueError: the image processor contradicts the model.
    """
    channels = arguments["channels"]
    usual = usual_pixels(usual, channels, {} if folder.config else folder.tensors)
    processed = None if folder.processor is None else _of_processor(folder, usual, arguments)
    given = folder.config.get("pretrained_cfg") or {}
    if "architecture" in folder.config and ("mean" in given or "std" in given or not processed):
        return _of_timm(given, usual, channels, processed, notes)
    if processed is None:
        notes.append("there is no preprocessor_config.json: mean and std are those of its class")
        return usual
    return processed


def usual_pixels(usual: Pixels, channels: int, tensors: Collection[str]) -> Pixels:
    """Return the usual mean and std of a model's channels; halves for SigLIP and other images.

    Args:
        usual: of its class, for three channels.
        channels: of the model.
        tensors: names of its weights, where these alone say its class.
    """
    if channels == len(usual[0]) and not any(name.startswith(TOWER) for name in tensors):
        return usual
    return (_HALF,) * channels, (_HALF,) * channels


def fit_of(folder: Folder, usual: str) -> str:
    """Return how images get their shape, one of `zeta.models.exported.FITS`; else `usual`."""
    processor = folder.processor or {}
    if "do_center_crop" in processor or "max_num_patches" in processor:
        if processor.get("do_center_crop"):
            return "crop"
        return "keep" if "max_num_patches" in processor else "squash"
    mode = (folder.config.get("pretrained_cfg") or {}).get("crop_mode")
    if mode == "squash":
        return "squash"
    if "naflex" in str(folder.config.get("architecture")):
        return "keep"
    return "crop" if mode in ("center", "border") else usual


def _of_timm(
    given: Mapping[str, Any],
    usual: Pixels,
    channels: int,
    processed: Pixels | None,
    notes: list[str],
) -> Pixels:
    """Return mean and std of a `pretrained_cfg`."""
    found = []
    for i, name in enumerate(("mean", "std")):
        if name not in given:
            notes.append(f"pretrained_cfg has no {name}: that of its class is assumed")
        value = given.get(name, usual[i])
        found.append(_numbers(f"pretrained_cfg's {name}", value, channels))
        if processed is not None and _differ(found[i], processed[i]):
            raise ValueError(
                f"pretrained_cfg has the {name} {list(found[i])}, the image processor "
                f"{list(processed[i])}: {_NOT_OF_THIS_MODEL}"
            )
    return found[0], found[1]


def _of_processor(folder: Folder, usual: Pixels, arguments: Mapping[str, Any]) -> Pixels:
    processor, channels = folder.processor or {}, arguments["channels"]
    patch = processor.get("patch_size", arguments["patch_size"])
    patch = patch.get("height") if isinstance(patch, Mapping) else patch
    if patch != arguments["patch_size"]:
        raise ValueError(
            f"the image processor cuts patches of {patch} pixels, the model takes "
            f"{arguments['patch_size']}: {_NOT_OF_THIS_MODEL}"
        )
    if not processor.get("do_rescale", True) or (
        abs(float(processor.get("rescale_factor", 1 / 255)) * 255 - 1) > 1e-3
    ):
        raise ValueError(
            "the image processor does not rescale pixels by 1/255 (do_rescale, rescale_factor), "
            "which zeta always does"
        )
    if not processor.get("do_normalize", True):
        return (0.0,) * channels, (1.0,) * channels
    names = ("image_mean", "image_std")
    found = [
        _numbers(f"the image processor's {name}", processor.get(name, default), channels)
        for name, default in zip(names, usual, strict=True)
    ]
    return found[0], found[1]


def _numbers(name: str, value: Any, channels: int) -> tuple[float, ...]:
    """Return a mean or std as one number for each channel.

    Raises:
        ValueError: it has another number of them, a std that is not positive, or a mean beyond
            [0, 1].
    """
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * channels
    if len(values) != channels or not all(isinstance(each, int | float) for each in values):
        raise ValueError(
            f"{name} is {value!r}, but the model takes {channels} channels: {_NOT_OF_THIS_MODEL}"
        )
    if "std" in name and not all(each > 0 for each in values):
        raise ValueError(f"{name} is {value!r}: it must be positive")
    if "mean" in name and not all(0 <= each <= 1 for each in values):
        raise ValueError(
            f"{name} is {value!r}: it must be of pixels in [0, 1], which is where zeta scales them"
        )
    return tuple(float(each) for each in values)


def _differ(one: Sequence[float], other: Sequence[float]) -> bool:
    return any(abs(a - b) > _ALMOST for a, b in zip(one, other, strict=True))
