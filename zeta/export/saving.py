"""Write trained models to a folder in one or several formats, the folder whole or absent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zeta.export.folder import whole_directory
from zeta.export.formats import open_formats
from zeta.export.protocol import MAX_FILE_BYTES, ExportFormat, ModelToExport, TextExport
from zeta.models.export_checks import CHECKSUMS, checksums
from zeta.models.exported import CONFIG_FILE
from zeta.stored_tensors import in_memory


def save_pretrained(
    out_dir: Path | str,
    state_dict: Mapping[str, Tensor],
    model_arguments: Mapping[str, Any],
    info: Mapping[str, Any] | None = None,
    text: TextExport | None = None,
    *,
    form: str = "zeta",
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Write a model that is in memory to `out_dir` and return its path.

    Args:
        out_dir: new directory; one that holds an export already is replaced as a whole.
        state_dict: whole (not sharded) weights by parameter name, buffers mean and std included.
        model_arguments: `ModelConfig.resolve()`: arch and constructor arguments.
        info: JSON-able facts to keep with the weights (step, class names, where they come from).
        text: the text encoder that the model, then an image encoder, was trained with.
        form: name of a format, or of a combination, in `zeta.export.formats`.
        max_file_bytes: weights beyond this are written as several files, where the format allows.

    Raises:
        ValueError: an option that the format cannot express, by name; or `out_dir` exists and is
            not an export.
    """
    formats = open_formats(form)
    check_formats(formats, model_arguments)
    model = ModelToExport(
        model_arguments,
        in_memory(state_dict),
        info or {},
        text=text,
        max_file_bytes=max_file_bytes,
    )
    with whole_directory(out_dir) as partial:
        write_formats(partial, formats, model)
    return Path(out_dir).expanduser()


def check_formats(formats: Sequence[ExportFormat], model_arguments: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the option, for a model that one of the formats cannot express."""
    for each in formats:
        obstacle = each.obstacle(model_arguments)
        if obstacle is not None:
            raise ValueError(obstacle)


def write_formats(directory: Path, formats: Sequence[ExportFormat], model: ModelToExport) -> None:
    """Write a model in each format to `directory`, and the config.json of all of them.

    Raises:
        OSError, ValueError: as `ExportFormat.write`.
    """
    config: dict[str, Any] = {}
    for each in reversed(formats):  # where two formats use one key, the first wins
        config |= each.write(directory, model, alone=len(formats) == 1)
    config[CHECKSUMS] = checksums(directory)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
