"""Make an export of ours from a published encoder, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zeta.export.card import card_arguments
from zeta.export.folder import check_free, whole_directory
from zeta.export.formats import open_formats
from zeta.export.protocol import MAX_FILE_BYTES, ModelToExport
from zeta.export.saving import write_formats
from zeta.models.config import model_from_arguments
from zeta.models.exported import CARD_FILE, CONFIG_FILE, check_weights
from zeta.models.published.reading import Opened, is_export, is_foreign, open_published


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
        ValueError: no published encoder, or one that NaViT cannot express, by name; `out` is its
            place, or holds something else. Nothing is left behind.
        OSError: a file cannot be written.
    """
    _check_apart(source, out)
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
        use = formats[0].card(card_arguments(model.arguments, model.facts))
        (partial / CARD_FILE).write_text(_card(source, opened, use))
    return Imported(out, opened.config["model"], opened.notes)


def open_encoder(source: Path, heads: int | None = None) -> Opened:
    """Open a published encoder as an export of ours, with every weight's shape checked.

    Raises:
        ValueError: as `import_encoder`.
    """
    if not is_foreign(source):
        if is_export(source):
            raise ValueError(f"{source} is an export of zeta already: use it as it is")
        raise ValueError(
            f"{source} holds no published encoder: give a folder of transformers or timm with "
            f"model.safetensors and {CONFIG_FILE}, or a .safetensors file of timm"
        )
    opened = open_published(source, heads)
    check_weights(source, opened.config["model"], opened.tensors, model_from_arguments)
    return opened


def _check_apart(source: Path, out: Path) -> None:
    """Raise ValueError if the export would replace its own source, or what lies around it."""
    theirs, ours = source.expanduser().resolve(), out.expanduser().resolve()
    if ours == theirs or ours in theirs.parents:
        raise ValueError(
            f"{out} holds {source}, which an export there would replace: name another folder"
        )


def _card(source: Path, opened: Opened, use: str) -> str:
    info = opened.config["info"]
    arguments, imported = card_arguments(opened.config["model"], info), info["imported"]
    notes = "".join(f"\n- {note}" for note in opened.notes) or "\n- nothing"
    return (
        f"# {source.absolute().name}\n\nA {imported['class']}, imported as a NaViT.\n\n"
        f"Left out or assumed:\n{notes}\n\n## Use\n\n{use}\n\n## Options\n\n```json\n"
        f"{json.dumps(arguments, indent=2)}\n```\n"
    )
