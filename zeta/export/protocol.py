"""The protocol of an export format, and the model that is handed to it.

A new format is one module with an instance of `ExportFormat` called FORMAT, and one entry in the
table of `zeta.export.formats`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from zeta.stored_tensors import StoredTensor

MAX_FILE_BYTES = 5 * 10**9
"""Default size beyond which weights are written as several files."""
PLACE = "path/to/this/folder"
"""Stands for the folder of the export in the code of a model card."""


@dataclass(frozen=True)
class TextExport:
    """The text encoder of an image-text model, as it goes into an export."""

    arguments: Mapping[str, Any]
    """Constructor arguments of `zeta.models.text_tower.TextTower`, and the `kind` of objective."""
    tensors: Mapping[str, StoredTensor]
    """Weights of the text tower under `text.`, of scale and bias under `logits.`."""
    tokenizer: Path | None
    """The tokenizer.json; None: the tokens are bytes."""


@dataclass(frozen=True)
class ModelToExport:
    """A trained model and the facts that are kept with it."""

    arguments: Mapping[str, Any]
    """Result of `ModelConfig.resolve()`: arch and constructor arguments."""
    tensors: Mapping[str, StoredTensor]
    """Whole (not sharded) weights by parameter name, buffers mean and std included."""
    facts: Mapping[str, Any]
    """JSON-able facts: step, class names, where the weights come from."""
    resolution: Mapping[str, Any] | None = None
    """Sizes that the images had in training, the fields of `data.resolution`."""
    text: TextExport | None = None
    """The text encoder that the model, then an image encoder, was trained with."""
    max_file_bytes: int = MAX_FILE_BYTES
    """Weights beyond this are written as several files, where the format allows it."""


class ExportFormat(Protocol):
    """A way to write a model to a folder. Formats may share the folder and its config.json."""

    def obstacle(self, arguments: Mapping[str, Any]) -> str | None:
        """Return why a model cannot be written, naming the option; None if it can.

        Args:
            arguments: `ModelConfig.resolve()`: arch and constructor arguments.
        """
        ...

    def nbytes(self, model: ModelToExport) -> int:
        """Return the bytes that the weights take on disk."""
        ...

    def write(self, directory: Path, model: ModelToExport, *, alone: bool) -> dict[str, Any]:
        """Write all files but config.json, one tensor in memory at a time.

        Args:
            directory: exists.
            model: what to write; `obstacle` has nothing against it.
            alone: False where another format writes to the same folder.

        Returns:
            The format's entries of config.json.

        Raises:
            OSError: a file cannot be written.
            ValueError: a weight has values that its type cannot hold.
        """
        ...

    def card(self, arguments: Mapping[str, Any]) -> str:
        """Return the part of the model card that shows how to load the model, in Markdown.

        Args:
            arguments: arch and constructor arguments; `num_classes` is 0 where no class was learned
                and the head is as it was drawn, so that embeddings are all there is to use.
        """
        ...

    def files(self, names: Collection[str], config: Mapping[str, Any]) -> set[str]:
        """Return which files of a folder this format wrote; none if no weights of it are there.

        Args:
            names: all files of the folder.
            config: content of its config.json.
        """
        ...
