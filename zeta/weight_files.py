"""Weights on disk to begin a run at: of a run, a checkpoint in it, or an export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zeta.checkpoint import (
    TRAINER_STATE,
    newest_whole,
    open_zero_state,
    read_trainer_state,
    require_whole,
    step_names,
)
from zeta.exit_codes import RunError
from zeta.optim import parameter_shapes
from zeta.pretrained import CONFIG_FILE, WEIGHTS_FILE, read_config
from zeta.run_dir import RunDir

_HEAD = "head."
_IMAGE = "image."
"""Before the names of the image encoder's weights in a run that compares images with captions."""


@dataclass(frozen=True)
class WeightFiles:
    """Weights on disk, read one at a time."""

    shapes: Mapping[str, list[int]]
    """Shape of every weight and buffer, by name in the model."""
    read: Callable[[str], Tensor]

    def for_model(self, names: Iterable[str]) -> WeightFiles:
        """Return what a model with parameters of these `names` can begin at.

        Of an image-text run a model without captions takes the image encoder, but not its head:
        that maps into the space of the captions.
        """
        if not _is_image_text(self.shapes) or _is_image_text(names):
            return self
        return WeightFiles(_image_encoder(self.shapes), lambda name: self.read(_IMAGE + name))


def open_weights(path: Path) -> WeightFiles:
    """Open the weights of a run directory, of a checkpoint `step_XXXXXXXX/`, or of an export.

    Of a run it is the newest checkpoint that passes its hashes.

    Raises:
        ValueError: `path` is none of them, or what is there is damaged.
    """
    if (path / CONFIG_FILE).is_file():
        return _open_export(path)
    if (path / TRAINER_STATE).is_file():
        require_whole(path)
        return _open_checkpoint(path)
    if RunDir(path).checkpoints.is_dir():
        return _open_checkpoint(newest_whole(RunDir(path).checkpoints))
    what = "holds none of them" if path.is_dir() else "is no folder"
    raise ValueError(
        f"{path} {what}: give a run directory, a checkpoint in it (checkpoints/step_XXXXXXXX), or "
        "a folder written by `zeta export`"
    )


def check_initial_weights(model: nn.Module, path: str) -> None:
    """Refuse, before anything starts, what is not there or of another model.

    Of a checkpoint only the list of its parameters is read; its bytes are verified when it is
    loaded, and so is which checkpoint of a run is the newest good one.

    Args:
        model: the model of the run, on any device.
        path: `train.init_from`.

    Raises:
        RunError: nothing to read there, or weights of another model.
    """
    folder, wanted = Path(path).expanduser(), parameter_shapes(model)
    checkpoints = RunDir(folder).checkpoints
    try:
        if (folder / TRAINER_STATE).is_file():
            shapes: Mapping[str, list[int]] = read_trainer_state(folder)["parameters"]
        elif not (folder / CONFIG_FILE).is_file() and checkpoints.is_dir():
            names = step_names(checkpoints)
            if not names or not (checkpoints / names[-1] / TRAINER_STATE).is_file():
                newest_whole(checkpoints)  # says what is wrong with those that are there
                return
            shapes = read_trainer_state(checkpoints / names[-1])["parameters"]
        else:
            shapes = open_weights(folder).shapes
            wanted |= {name: list(buffer.shape) for name, buffer in model.named_buffers()}
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        raise RunError(f"train.init_from cannot be read: {error}") from error
    if _is_image_text(shapes) and not _is_image_text(wanted):
        shapes = _image_encoder(shapes)
    head_to_leave(wanted, shapes, path)


def head_to_leave(
    wanted: Mapping[str, list[int]],
    shapes: Mapping[str, list[int]],
    path: str,
    *,
    new_head: bool = False,
) -> list[str]:
    """Return the names of the head's parameters if it is of another shape in the files, or new.

    Raises:
        RunError: anything but the head is of another shape.
    """
    different = [n for n in sorted({*wanted, *shapes}) if wanted.get(n) != shapes.get(n)]
    for name in different:
        if not name.startswith(_HEAD):
            raise RunError(
                f"train.init_from is {path}, whose weights are of another model: {name} is "
                f"{shapes.get(name, 'absent')} there and {wanted.get(name, 'absent')} in this "
                "config; make model.* the same"
            )
    return [name for name in wanted if (different or new_head) and name.startswith(_HEAD)]


def _is_image_text(names: Iterable[str]) -> bool:
    return any(name.startswith(_IMAGE) for name in names)


def _image_encoder(shapes: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Return the shapes of the image encoder without its head, under its own names."""
    own = {n.removeprefix(_IMAGE): s for n, s in shapes.items() if n.startswith(_IMAGE)}
    return {name: shape for name, shape in own.items() if not name.startswith(_HEAD)}


def _open_export(path: Path) -> WeightFiles:
    image_text = "text" in read_config(path)
    file: Any = safe_open(path / WEIGHTS_FILE, framework="pt")  # the library has no types
    names: list[str] = file.keys()
    shapes = {name: list(file.get_slice(name).get_shape()) for name in names}
    if image_text:  # an export holds the image encoder under its own names
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(_HEAD)}
    return WeightFiles(shapes, file.get_tensor)


def _open_checkpoint(directory: Path) -> WeightFiles:
    state = open_zero_state(directory, read_trainer_state(directory))
    shapes = {name: list(buffer.shape) for name, buffer in state.buffers.items()}

    def read(name: str) -> Tensor:
        return state.buffers[name] if name in state.buffers else state.full(name)

    return WeightFiles({**state.shapes, **shapes}, read)
