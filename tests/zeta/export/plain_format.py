"""A small export format that zeta does not have: the weights of the head, as text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from zeta.export.protocol import ExportFormat, ModelToExport

NAME = "plain.txt"


class PlainFormat(ExportFormat):
    """Numbers of the head, one a line."""

    def obstacle(self, arguments: Mapping[str, Any]) -> str | None:
        return "model.registers is set: plain text has none" if arguments.get("registers") else None

    def nbytes(self, model: ModelToExport) -> int:
        return 30 * model.tensors["head.weight"].nbytes

    def write(self, directory: Path, model: ModelToExport, *, alone: bool) -> dict[str, Any]:
        values = model.tensors["head.weight"].load().flatten().tolist()
        (directory / NAME).write_text("".join(f"{value}\n" for value in values))
        return {"plain": {"classes": model.facts["class_names"], "alone": alone}}

    def card(self, arguments: Mapping[str, Any]) -> str:
        return f"With a text editor: open {NAME}, {arguments['dim']} numbers a class."

    def files(self, names: Collection[str], config: Mapping[str, Any]) -> set[str]:
        return {NAME} if NAME in names and "plain" in config else set()


FORMAT = PlainFormat()
