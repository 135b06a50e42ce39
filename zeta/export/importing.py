"""Make an export of ours from a published encoder, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zeta.export.folder import check_free, whole_directory
from zeta.export.formats import open_formats
from zeta.export.protocol import MAX_FILE_BYTES, ModelToExport
from zeta.export.saving import write_formats
from zeta.export.timm.published import fit_timm, is_timm, navit_arguments, open_timm
from zeta.models.config import model_from_arguments
from zeta.models.exported import CARD_FILE, CONFIG_FILE, check_weights
from zeta.models.published.reading import Opened, open_published
from zeta.models.sources import is_foreign
from zeta.stored_tensors import zeros


@dataclass(frozen=True)
class Imported:
    """An export that was made of a published encoder."""

    folder: Path
    arguments: Mapping[str, Any]
    """Arch and constructor arguments of the model."""
    notes: list[str]
    """What was left out or assumed, in sentences."""


def import_encoder(
    source: Path, out: Path, *, heads: int | None = None, max_file_bytes: int = MAX_FILE_BYTES
) -> Imported:
    """Write a published encoder as an export of ours, one tensor in memory at a time.

    Args:
        source: folder of transformers or timm, or a .safetensors file of timm.
        out: folder to write; a former export there is replaced once the new one is whole.
        heads: attention heads of a ViT of timm whose files do not tell them.
        max_file_bytes: weights beyond this are written as several files.

    Raises:
        ValueError: no published encoder, or one that NaViT cannot express, by name; `out` holds
            something else. Nothing is left behind.
        OSError: a file cannot be written.
    """
    check_free(out)
    opened = open_encoder(source, heads)
    model = ModelToExport(
        opened.config["model"],
        opened.tensors,
        opened.config["info"],
        opened.config["info"].get("resolution"),
        max_file_bytes=max_file_bytes,
    )
    formats = open_formats("zeta")
    with whole_directory(out) as partial:
        write_formats(partial, formats, model)
        (partial / CARD_FILE).write_text(_card(source, opened, formats[0].card(model.arguments)))
    return Imported(out, opened.config["model"], opened.notes)


def open_encoder(source: Path, heads: int | None = None) -> Opened:
    """Open a published encoder as an export of ours, with every weight's shape checked.

    Raises:
        ValueError: as `import_encoder`.
    """
    if is_foreign(source):
        opened = open_published(source)
    elif is_timm(source):
        opened = _open_timm(source, heads)
    else:
        raise ValueError(
            f"{source} holds no published encoder: give a folder of transformers or timm with "
            f"model.safetensors and {CONFIG_FILE}, or a .safetensors file of timm"
        )
    check_weights(source, opened.config["model"], opened.tensors, model_from_arguments)
    return opened


def _open_timm(source: Path, heads: int | None) -> Opened:
    """Open a ViT or NaFlexVit of timm."""
    weights = open_timm(source)
    arguments = {"arch": "navit", **navit_arguments(weights, heads)}
    pixels = {name: list(arguments.pop(name)) for name in ("mean", "std")}
    with torch.device("meta"):
        model = model_from_arguments(arguments)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors, note = fit_timm(weights, wanted)
    notes = [note] if note else []
    has_head = "head.weight" in tensors
    for name in () if has_head else ("head.weight", "head.bias"):
        tensors[name] = zeros(tuple(wanted[name]), torch.float32)
    if not has_head:
        notes.append("it has no head: one of zeros, for one class, stands in its place")
    names = weights.config.get("label_names")
    imported = {
        "class": weights.config.get("architecture", "timm"),
        "head": has_head,
        "notes": notes,
    }
    info = {
        "imported": imported,
        "targets": "label" if has_head else "none",
        "class_names": names if isinstance(names, list) else None,
    }
    preprocessing = pixels | {
        "channels": arguments["channels"],
        "patch_size": arguments["patch_size"],
    }
    options = {name: value for name, value in arguments.items() if value is not None}
    return Opened({"model": options, "preprocessing": preprocessing, "info": info}, tensors)


def _card(source: Path, opened: Opened, use: str) -> str:
    arguments, imported = opened.config["model"], opened.config["info"]["imported"]
    notes = "".join(f"\n- {note}" for note in opened.notes) or "\n- nothing"
    return (
        f"# {source.absolute().name}\n\nA {imported['class']}, imported as a NaViT.\n\n"
        f"Left out or assumed:\n{notes}\n\n## Use\n\n{use}\n\n## Options\n\n```json\n"
        f"{json.dumps(arguments, indent=2)}\n```\n"
    )
