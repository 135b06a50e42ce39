"""Open the folder of a published encoder as an export of ours: its config.json and its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zeta.files import read_json
from zeta.models.arguments import IMAGENET_MEAN, IMAGENET_STD
from zeta.models.exported import CONFIG_FILE, FORMAT, MOST_BYTES
from zeta.models.published.classes import CLASSIFIER, class_names, class_of
from zeta.models.published.dinov3 import dinov3
from zeta.models.published.eva import ARCHITECTURES, eva
from zeta.models.published.files import AGAIN, Folder, has_weights, naming, open_folder, read_object
from zeta.models.published.pixels import Pixels, fit_of, pixels_of
from zeta.models.published.tensors import Renaming, check_floats
from zeta.models.published.timm_vit import plain_vit
from zeta.models.published.towers import clip, siglip
from zeta.models.published.vit import dinov2, vit
from zeta.stored_tensors import StoredTensor, in_memory, zeros

_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
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


EVA, PLAIN = "timm_eva", "timm_vit"
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
    PLAIN: Kind(plain_vit, "ViT and NaFlexVit of timm", (IMAGENET_MEAN, IMAGENET_STD), "crop"),
    "vit": Kind(vit, "ViTModel, ViTForImageClassification", (_HALF, _HALF)),
}
"""Kinds of encoders by the `model_type` of their config.json in transformers; timm has none.

A file of weights without a config is taken for a plain ViT of timm.
"""


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


def is_foreign(path: Path) -> bool:
    """Return whether `path` holds a published encoder: a folder of it, or a file of weights."""
    if path.is_file():
        return path.suffix == ".safetensors"
    file = path / CONFIG_FILE
    if not file.is_file():
        return has_weights(path)
    config = read_json(file, limit=MOST_BYTES, what="export or download it again")
    if not isinstance(config, dict):
        return has_weights(path)
    if "format" in config:
        return False
    return "model_type" in config or "architecture" in config or has_weights(path)


def is_export(path: Path) -> bool:
    """Return whether `path` is an export of zeta, of whatever version."""
    file = path / CONFIG_FILE
    config = read_json(file, limit=MOST_BYTES, what=AGAIN) if file.is_file() else None
    return isinstance(config, dict) and str(config.get("format")).startswith("zeta-")


def is_plain_timm(path: Path) -> bool:
    """Return whether a published encoder is a plain ViT or a NaFlexVit of timm."""
    file = path / CONFIG_FILE
    return model_type_of(read_object(file) if file.is_file() else {}) == PLAIN


def model_type_of(config: Mapping[str, Any]) -> str:
    """Return the kind of a published encoder: the `model_type` of transformers, or one of timm."""
    if "architecture" in config:
        return EVA if ARCHITECTURES.search(str(config["architecture"])) else PLAIN
    return str(config.get("model_type") or PLAIN)


def open_published(path: Path, heads: int | None = None) -> Opened:
    """Open a published encoder; its weights are read later, one at a time.

    Args:
        path: its folder, or a .safetensors file of timm.
        heads: attention heads of a plain ViT of timm whose files do not tell them.

    Raises:
        ValueError: something that NaViT does not have, or files that are missing, damaged or
            contradict each other; names the folder and the fault.
    """
    with naming(path):
        folder = open_folder(path)
        if heads is not None:
            told = {**(folder.config.get("model_args") or {}), "num_heads": heads}
            folder = replace(folder, config={**folder.config, "model_args": told})
        try:
            return _opened(folder)
        except ValueError as error:
            if path.is_file() or folder.config:
                raise
            raise ValueError(
                f"{error}; without a {CONFIG_FILE} they are taken for those of a ViT of timm"
            ) from error


def _opened(folder: Folder) -> Opened:
    config = folder.config
    model_type = model_type_of(config)
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
    mean, std = pixels_of(folder, kind.pixels, arguments, notes)
    tensors |= in_memory({"mean": torch.tensor(mean), "std": torch.tensor(std)})
    arguments = {name: value for name, value in arguments.items() if value is not None}
    rows = arguments["num_classes"] if has_head else None
    names = class_names(config, folder.tensors, rows)
    classifies = has_head and ("architecture" in config or CLASSIFIER in folder.tensors)
    info = {
        "imported": {
            "class": class_of(config, model_type),
            "model_type": model_type,
            "head": has_head,
            "notes": notes,
        },
        "targets": "label" if classifies else "none",
        "class_names": names,
        "resolution": {
            "max": max(arguments["image_size"]),
            "fit": fit_of(folder, kind.fit),
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
