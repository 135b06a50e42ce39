"""The table of export formats. Formats load torch, so a module is imported when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from zeta.export.protocol import ExportFormat


class FormatEntry(NamedTuple):
    """An export format."""

    module: str
    """Module with the `zeta.export.protocol.ExportFormat` called FORMAT."""
    use: str
    """The use of such an export, for the help of the command."""
    expected: bool = True
    """Whether training warns, before its first step, that its model cannot be exported so."""


FORMATS = {
    "zeta": FormatEntry("zeta.export.zeta_format", "`zeta eval` and NaViT.from_pretrained('OUT')"),
    "timm": FormatEntry(
        "zeta.export.timm.format", "timm.create_model('local-dir:OUT', pretrained=True)"
    ),
    "transformers": FormatEntry(
        "zeta.export.transformers.format",
        "transformers' AutoModel.from_pretrained('OUT'), of models with rope or grid_bilinear",
        expected=False,
    ),
    "onnx": FormatEntry(
        "zeta.export.onnx.format", "onnxruntime, images of any one size a batch", expected=False
    ),
}
"""Formats by name."""
COMBINED = {"both": ("zeta", "timm")}
"""Formats that are written side by side to one folder, by the name of the combination."""


def format_names() -> list[str]:
    """Return the names of all formats and combinations."""
    return [*FORMATS, *COMBINED]


def open_formats(name: str) -> list[ExportFormat]:
    """Return the format, or the formats of the combination, that has this name.

    Raises:
        ValueError: no such format.
    """
    if name not in format_names():
        raise ValueError(f"the format is {name!r}; choose one of {', '.join(format_names())}")
    return [_format(part) for part in COMBINED.get(name, (name,))]


def all_formats() -> dict[str, ExportFormat]:
    """Return every format by name."""
    return {name: _format(name) for name in FORMATS}


def obstacles(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return why a model cannot be exported to a format that it is expected to go to, by its name.

    Args:
        arguments: `ModelConfig.resolve()`: arch and constructor arguments.
    """
    found = {name: each.obstacle(arguments) for name, each in all_formats().items()}
    expected = {name for name, entry in FORMATS.items() if entry.expected}
    return {name: obstacle for name, obstacle in found.items() if obstacle and name in expected}


def _format(name: str) -> ExportFormat:
    found: ExportFormat = importlib.import_module(FORMATS[name].module).FORMAT
    return found
