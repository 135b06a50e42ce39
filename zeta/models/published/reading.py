"""Open the folder of a published encoder as an export of ours: its config.json and its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zeta.models.arguments import IMAGENET_MEAN, IMAGENET_STD
from zeta.models.exported import FORMAT
from zeta.models.published.dinov3 import dinov3
from zeta.models.published.eva import ARCHITECTURES, eva
from zeta.models.published.files import Folder, open_folder
from zeta.models.published.tensors import Renaming, check_floats
from zeta.models.published.towers import clip, siglip
from zeta.models.published.vit import dinov2, vit
from zeta.stored_tensors import StoredTensor, in_memory, zeros

_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Pixels = tuple[tuple[float, ...], tuple[float, ...]]
Convert = Callable[[Mapping[str, Any], Mapping[str, StoredTensor]], tuple[dict[str, Any], Renaming]]


@dataclass(frozen=True)
class Kind:
    """A kind of published encoder."""

    convert: Convert
    """Maps its config and weights to arguments of a NaViT and weights under NaViT's names."""
    classes: str
    """Its classes, for the documents."""
    pixels: Pixels
    """Usual mean and std of the pixels, where no image processor gives them."""
    fit: str = "squash"
    """How its images get their shape, where no image processor says it."""


EVA = "timm_eva"
KINDS: dict[str, Kind] = {
    "clip": Kind(clip, "CLIPModel", (_CLIP_MEAN, _CLIP_STD), "crop"),
    "clip_vision_model": Kind(
        clip, "CLIPVisionModel, CLIPVisionModelWithProjection", (_CLIP_MEAN, _CLIP_STD), "crop"
    ),
    "dinov2": Kind(dinov2, "Dinov2Model", (IMAGENET_MEAN, IMAGENET_STD), "crop"),
    "dinov2_with_registers": Kind(
        dinov2, "Dinov2WithRegistersModel", (IMAGENET_MEAN, IMAGENET_STD), "crop"
    ),
    "dinov3_vit": Kind(dinov3, "DINOv3ViTModel", (IMAGENET_MEAN, IMAGENET_STD)),
    "siglip": Kind(siglip, "SiglipModel, SiglipForImageClassification", (_HALF, _HALF)),
    "siglip_vision_model": Kind(siglip, "SiglipVisionModel", (_HALF, _HALF)),
    "siglip2": Kind(siglip, "Siglip2Model, Siglip2ForImageClassification", (_HALF, _HALF), "keep"),
    "siglip2_vision_model": Kind(siglip, "Siglip2VisionModel", (_HALF, _HALF), "keep"),
    EVA: Kind(eva, "DINOv3 and EVA-02 of timm (Eva)", (IMAGENET_MEAN, IMAGENET_STD)),
    "vit": Kind(vit, "ViTModel, ViTForImageClassification", (_HALF, _HALF)),
}
"""Kinds of encoders by the `model_type` of their config.json in transformers; timm has none."""


@dataclass(frozen=True)
class Opened:
    """A published encoder as an export of ours."""

    config: dict[str, Any]
    """What config.json of the export holds."""
    tensors: dict[str, StoredTensor]
    """Weights by NaViT's names, buffers mean and std included."""

    @property
    def notes(self) -> list[str]:
        """What was left out or assumed, in sentences."""
        return list(self.config["info"]["imported"]["notes"])

    @property
    def options(self) -> str:
        """The settings `model.*` of an equal model; the number of classes is left out."""
        given = self.config["model"].items()
        options = (f"model.{k}={v}" for k, v in given if k != "num_classes")
        return " ".join(options).replace(", ", ",")


def is_published(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of a class of transformers, or of timm's Eva."""
    return "format" not in config and _model_type(config) is not None


def _model_type(config: Mapping[str, Any]) -> str | None:
    if "architecture" in config:
        return EVA if ARCHITECTURES.search(str(config["architecture"])) else None
    found = config.get("model_type")
    return None if found is None else str(found)


def open_published(path: Path) -> Opened:
    """Open the folder of a published encoder; its weights are read later, one at a time.

    Raises:
        ValueError: something that NaViT does not have, or files that are missing, damaged or
            contradict each other; names the folder and the fault.
    """
    try:
        return _opened(open_folder(path))
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} cannot be read: config.json is damaged ({error!r})") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _opened(folder: Folder) -> Opened:
    config = folder.config
    model_type = _model_type(config)
    if model_type not in KINDS:
        raise ValueError(
            f"model_type is {model_type!r} in config.json; zeta reads {', '.join(sorted(KINDS))}"
        )
    kind = KINDS[model_type]
    arguments, renaming = kind.convert(config, folder.tensors)
    tensors, notes = renaming.finish(), list(renaming.notes)
    check_floats(tensors)
    has_head = "head.weight" in tensors
    if not has_head:
        tensors["head.weight"] = zeros((1, arguments["dim"]), torch.float32)
        tensors["head.bias"] = zeros((1,), torch.float32)
        notes.append("it has no head: one of zeros, for one class, stands in its place")
    arguments["num_classes"] = tensors["head.weight"].shape[0]
    mean, std = _pixels(folder, kind, arguments, notes)
    tensors |= in_memory({"mean": torch.tensor(mean), "std": torch.tensor(std)})
    arguments = {name: value for name, value in arguments.items() if value is not None}
    labels = config.get("id2label") if _is_classifier(config) else None
    info = {
        "imported": {
            "class": (config.get("architectures") or [model_type])[0],
            "model_type": model_type,
            "head": has_head,
            "notes": notes,
        },
        "targets": "label" if labels else "none",
        "class_names": _names(labels) if labels else None,
        "resolution": {
            "max": max(arguments["image_size"]),
            "fit": _fit(folder, kind),
            "max_upscale": 1.0,
        },
    }
    preprocessing = {
        "mean": list(mean),
        "std": list(std),
        "channels": arguments["channels"],
        "patch_size": arguments["patch_size"],
    }
    made = {"format": FORMAT, "model": arguments, "preprocessing": preprocessing, "info": info}
    return Opened(made, tensors)


def _is_classifier(config: Mapping[str, Any]) -> bool:
    return any("ForImageClassification" in name for name in config.get("architectures") or ())


def _names(labels: Mapping[str, str]) -> list[str]:
    return [str(labels[key]) for key in sorted(labels, key=int)]


def _pixels(folder: Folder, kind: Kind, arguments: Mapping[str, Any], notes: list[str]) -> Pixels:
    """Return mean and std of the pixels in [0, 1].

    Raises:
        ValueError: the image processor contradicts the model.
    """
    processor, channels = folder.processor, arguments["channels"]
    given = folder.config.get("pretrained_cfg") or {}
    if "mean" in given and "std" in given:  # of timm
        return tuple(given["mean"]), tuple(given["std"])
    if processor is None:
        notes.append("there is no preprocessor_config.json: mean and std are those of its class")
        usual = kind.pixels if channels == len(_HALF) else (_HALF, _HALF)
        mean, std = ((each * channels)[:channels] for each in usual)
        return mean, std
    patch = processor.get("patch_size", arguments["patch_size"])
    patch = patch.get("height") if isinstance(patch, Mapping) else patch
    if patch != arguments["patch_size"]:
        raise ValueError(
            f"the image processor cuts patches of {patch} pixels, the model takes "
            f"{arguments['patch_size']}: one of the two files is not of this model"
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
    found = []
    for name, default in zip(("image_mean", "image_std"), kind.pixels, strict=True):
        value = processor.get(name, default)
        values = tuple(value) if isinstance(value, list | tuple) else (value,) * channels
        if len(values) != channels or not all(isinstance(each, int | float) for each in values):
            raise ValueError(
                f"the image processor's {name} is {value!r}, but the model takes {channels} "
                "channels: one of the two files is not of this model"
            )
        if name == "image_std" and min(values) <= 0:
            raise ValueError(f"the image processor's {name} is {value!r}: it must be positive")
        found.append(tuple(float(each) for each in values))
    return found[0], found[1]


def _fit(folder: Folder, kind: Kind) -> str:
    processor = folder.processor or {}
    if "do_center_crop" in processor or "max_num_patches" in processor:
        if processor.get("do_center_crop"):
            return "crop"
        return "keep" if "max_num_patches" in processor else "squash"
    return kind.fit
