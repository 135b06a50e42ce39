"""Open weights that a run can start from: of a run, a checkpoint, an export, or published ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from torch import nn

from zeta.checkpoint.directory import (
    newest_whole,
    read_trainer_state,
    require_whole,
    stored_weights,
)
from zeta.exit_codes import RunError
from zeta.models.exported import CONFIG_FILE
from zeta.models.parameters import parameter_shapes
from zeta.models.published.fitting import fit, fit_timm
from zeta.models.published.reading import is_foreign, is_plain_timm, open_published
from zeta.models.published.timm_vit import needed_options, open_timm
from zeta.models.sources import open_export, read_config
from zeta.run.directory import TRAINER_STATE, RunDir, step_names
from zeta.stored_tensors import StoredTensor

_T = TypeVar("_T")
_HEAD = "head."
_IMAGE = "image."
"""Prefix of the image encoder's weights in a run that compares images with captions."""


@dataclass(frozen=True)
class OpenWeights:
    """Weights on disk, read one at a time."""

    tensors: Mapping[str, StoredTensor]
    """Tensors by their names in the model."""
    note: str = ""
    """Differences from the files, for the user."""
    options: str = ""
    """Settings `model.*` of an equal model, for published weights; or why there is none."""

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Return the shape of every tensor, by name."""
        return {name: list(tensor.shape) for name, tensor in self.tensors.items()}


def open_weights(path: Path, wanted: Mapping[str, list[int]]) -> OpenWeights:
    """Open the weights of a run directory, a checkpoint `step_XXXXXXXX/`, an export, or published.

    For a run, this opens its newest checkpoint that passes its hashes. Published weights (see
    `zeta.models.published`) are converted to the model's layout.

    Args:
        path: folder or file of the weights.
        wanted: shape of every parameter and buffer of the model, by name.

    Raises:
        ValueError: `path` is not one of these, or is damaged.
        RunError: a newer zeta wrote the checkpoint, in a format that this one does not know.
    """
    if is_foreign(path) and is_plain_timm(path):
        weights = open_timm(path)
        return OpenWeights(*fit_timm(weights, wanted), needed_options(weights))
    if is_foreign(path):
        published = open_published(path)
        fitted, note = fit(published.tensors, wanted)
        notes = "; ".join(filter(None, (note, *published.notes)))
        return OpenWeights(fitted, notes, published.options)
    if (path / CONFIG_FILE).is_file():
        tensors = open_export(path)  # the image encoder, under its own names
        return OpenWeights(_without_head(tensors) if "text" in read_config(path) else tensors)
    if (path / TRAINER_STATE).is_file():
        require_whole(path)
        return OpenWeights(for_model(stored_weights(path), wanted))
    if RunDir(path).checkpoints.is_dir():
        checkpoint = newest_whole(RunDir(path).checkpoints)
        return OpenWeights(for_model(stored_weights(checkpoint), wanted))
    what = "has no weights that zeta can read" if path.is_dir() else "is not a folder"
    raise ValueError(
        f"{path} {what}: give a run directory, a checkpoint in it (checkpoints/step_XXXXXXXX), a "
        "folder written by `zeta export`, or one of timm or transformers with model.safetensors"
    )


def check_initial_weights(model: nn.Module, path: str) -> None:
    """Refuse weights that are missing or of another model, before the run starts.

    Only the list of a checkpoint's parameters is read. Its bytes are verified later, when it is
    loaded; the newest good checkpoint of a run is also chosen then.

    Args:
        model: the model of the run, on any device.
        path: `train.init_from`.

    Raises:
        RunError: `path` has no weights, or those of another model.
    """
    folder, wanted, options = Path(path).expanduser(), parameter_shapes(model), ""
    checkpoints = RunDir(folder).checkpoints
    try:
        if (folder / TRAINER_STATE).is_file():
            shapes: Mapping[str, list[int]] = read_trainer_state(folder)["parameters"]
        elif (
            not is_foreign(folder) and not (folder / CONFIG_FILE).is_file() and checkpoints.is_dir()
        ):
            names = step_names(checkpoints)
            if not names or not (checkpoints / names[-1] / TRAINER_STATE).is_file():
                newest_whole(checkpoints)  # raises, naming the faults of those that are there
                return
            shapes = read_trainer_state(checkpoints / names[-1])["parameters"]
        else:
            wanted |= {name: list(buffer.shape) for name, buffer in model.named_buffers()}
            opened = open_weights(folder, wanted)
            shapes, options = opened.shapes, opened.options
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        raise RunError(f"train.init_from cannot be read: {error}") from error
    head_to_leave(wanted, for_model(shapes, wanted), path, options=options)


def head_to_leave(
    wanted: Mapping[str, list[int]],
    shapes: Mapping[str, list[int]],
    path: str,
    *,
    new_head: bool = False,
    options: str = "",
) -> list[str]:
    """Return the names of the head's parameters if its shape differs in the files, or it is new.

    Args:
        wanted: shapes in the model, by name.
        shapes: shapes in the files.
        path: path of the files.
        new_head: leave the head in any case.
        options: settings `model.*` of the files, where they are known.

    Raises:
        RunError: anything but the head has another shape.
    """
    different = [n for n in sorted({*wanted, *shapes}) if wanted.get(n) != shapes.get(n)]
    for name in different:
        if not name.startswith(_HEAD):
            raise RunError(
                f"train.init_from is {path}, whose weights are of another model: {name} is "
                f"{shapes.get(name, 'absent')} there and {wanted.get(name, 'absent')} in this "
                f"config; {_advice(options)}"
            )
    return [name for name in wanted if (different or new_head) and name.startswith(_HEAD)]


def _advice(options: str) -> str:
    if options and not options.startswith("model."):
        return f"they are of no NaViT: {options}"
    return f"make model.* the same{f': {options}' if options else ''}"


def for_model(there: Mapping[str, _T], names: Iterable[str]) -> Mapping[str, _T]:
    """Return the part of `there` that a model with parameters of these `names` can start from.

    From an image-text run, a model without captions takes the image encoder, but not its head,
    which maps into the space of the captions.
    """
    if not _is_image_text(there) or _is_image_text(names):
        return there
    own = {n.removeprefix(_IMAGE): value for n, value in there.items() if n.startswith(_IMAGE)}
    return _without_head(own)


def _is_image_text(names: Iterable[str]) -> bool:
    return any(name.startswith(_IMAGE) for name in names)


def _without_head(there: Mapping[str, _T]) -> dict[str, _T]:
    return {name: value for name, value in there.items() if not name.startswith(_HEAD)}
