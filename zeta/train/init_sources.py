"""Open weights that a run can start from: of a run, a checkpoint, an export, or published ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from torch import nn

from zeta.checkpoint.directory import (
    newest_whole,
    read_trainer_state,
    require_whole,
    stored_weights,
)
from zeta.exit_codes import RunError
from zeta.models.arguments import IMAGENET_MEAN, IMAGENET_STD
from zeta.models.config import with_defaults
from zeta.models.exported import CONFIG_FILE
from zeta.models.parameters import parameter_shapes
from zeta.models.published.fitting import fit, fit_timm, needed_options, told_arguments
from zeta.models.published.reading import is_foreign, is_plain_timm, open_published
from zeta.models.published.timm_weights import open_timm
from zeta.models.sources import open_export, read_config
from zeta.run.directory import TRAINER_STATE, RunDir, step_names
from zeta.stored_tensors import StoredTensor
from zeta.train.same_options import compare_options, encoder_arguments

_T = TypeVar("_T")
_HEAD = "head."
_IMAGE = "image."
"""Prefix of the image encoder's weights in objectives that have more than it."""
_PATCHES = "embeds.proj.weight"
"""A weight that image encoders have, and nothing else has."""


@dataclass(frozen=True)
class OpenWeights:
    """Weights on disk, read one at a time."""

    tensors: Mapping[str, StoredTensor]
    """Tensors by their names in the model."""
    note: str = ""
    """Differences from the files, for the user."""
    options: str = ""
    """Settings `model.*` of an equal model, for published weights; or why there is none."""
    arguments: Mapping[str, Any] | None = None
    """Options of that model, as far as the files tell them; None: they do not."""

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
    if is_foreign(path):
        prefix = encoder_prefix(wanted)
        own = {n.removeprefix(prefix): s for n, s in wanted.items() if n.startswith(prefix)}
        found = _open_encoder(path, own)
        return replace(found, tensors=for_model(found.tensors, wanted))
    if (path / CONFIG_FILE).is_file():
        tensors = open_export(path)  # the image encoder, under its own names
        config = read_config(path)
        kept = tensors if "text" not in config else _without_head(tensors)
        return OpenWeights(
            for_model(kept, wanted), _say_pixels(tensors), "", with_defaults(config["model"])
        )
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


def _open_encoder(path: Path, wanted: Mapping[str, list[int]]) -> OpenWeights:
    """Open a published encoder, fitted to the shapes of ours."""
    if is_plain_timm(path):
        weights = open_timm(path)
        fitted, note = fit_timm(weights, wanted)
        notes, options = [note, *weights.notes], needed_options(weights, wanted)
        arguments = told_arguments(weights, wanted)
    else:
        published = open_published(path)
        fitted, note = fit(published.tensors, wanted, published.config["model"]["position"])
        notes, options = [note, *published.notes], published.options
        arguments = with_defaults(published.config["model"])
    notes.append(_say_pixels(fitted))
    return OpenWeights(fitted, "; ".join(filter(None, notes)), options, arguments)


def _say_pixels(tensors: Mapping[str, StoredTensor]) -> str:
    """Return a note on the mean and std that come with the weights, unless they are the usual."""
    usual = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    found = {n: [round(v, 4) for v in tensors[n].read().tolist()] for n in usual if n in tensors}
    if all(values == list(usual[name]) for name, values in found.items()):
        return ""
    said = " and ".join(f"{name} {values}" for name, values in found.items())
    return f"its pixels are normalised with the {said}"


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
    folder, wanted = Path(path).expanduser(), parameter_shapes(model)
    opened = OpenWeights({})
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
            shapes = opened.shapes
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        raise RunError(f"train.init_from cannot be read: {error}") from error
    head_to_leave(wanted, for_model(shapes, wanted), path, options=opened.options)
    own = encoder_arguments(model, encoder_prefix(wanted))
    compare_options(opened.arguments, own, path, options=opened.options)


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
    anew = set(parts_to_leave(wanted, shapes))
    names = sorted({*wanted, *shapes} - anew)
    different = [name for name in names if wanted.get(name) != shapes.get(name)]
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


def for_model(there: Mapping[str, _T], names: Collection[str]) -> Mapping[str, _T]:
    """Return the part of `there` that a model with parameters of these `names` can start from.

    All of it, if both have the same parts. Else the encoder, under the name that it has in the
    model, but not its head, which is of another use.
    """
    if _same_parts(there, names):
        return there
    before, after = encoder_prefix(there), encoder_prefix(names)
    own = {n.removeprefix(before): value for n, value in there.items() if n.startswith(before)}
    return {after + name: value for name, value in _without_head(own).items()}


def parts_to_leave(wanted: Collection[str], there: Collection[str]) -> list[str]:
    """Return the names in a model of several parts that only its own kind of run has weights for.

    Args:
        wanted: names in the model.
        there: names in the files, as `for_model` returns them.
    """
    encoder = encoder_prefix(wanted)
    if not encoder or any(not name.startswith(encoder) for name in there):
        return []
    head = f"{encoder}{_HEAD}"
    return [n for n in wanted if not n.startswith(encoder) or n.startswith(head)]


def encoder_prefix(names: Iterable[str]) -> str:
    """Return the beginning of the names of a model's image encoder; "": the model is the encoder.

    Of several encoders, as of a student and its teacher, it is the one called `image`.
    """
    found = {name.removesuffix(_PATCHES) for name in names if name.endswith(_PATCHES)}
    return next(iter(found)) if len(found) == 1 else (_IMAGE if _IMAGE in found else "")


def _same_parts(there: Iterable[str], names: Iterable[str]) -> bool:
    there, names = list(there), list(names)
    if not encoder_prefix(there) and not encoder_prefix(names):
        return True
    first, second = ({name.partition(".")[0] for name in each} for each in (there, names))
    return first == second


def _without_head(there: Mapping[str, _T]) -> dict[str, _T]:
    return {name: value for name, value in there.items() if not name.startswith(_HEAD)}
