"""`train.init_from`: begin a run at the weights of another run, checkpoint or export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zeta.checkpoint import (
    TRAINER_STATE,
    newest_whole,
    open_zero_state,
    read_trainer_state,
    require_whole,
)
from zeta.distributed import World
from zeta.exit_codes import RunError
from zeta.optim import full_shape
from zeta.pretrained import CONFIG_FILE, WEIGHTS_FILE, read_config
from zeta.run_dir import RunDir

_HEAD = "head."


@dataclass(frozen=True)
class WeightFiles:
    """Weights on disk, read one at a time."""

    shapes: Mapping[str, list[int]]
    """Shape of every weight and buffer, by name in the model."""
    read: Callable[[str], Tensor]


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


def load_initial_weights(model: nn.Module, path: str, world: World) -> list[str]:
    """Set the weights and buffers of `model` to those at `path`, which rank 0 reads for all.

    Every rank calls this together, with a whole model or one that is sharded by `zero.Init`. A head
    of another shape (other classes) keeps its initial values.

    Returns:
        Names of the parameters of the head that were left as they are.

    Raises:
        RunError: nothing to read there, or weights of another model; on every rank alike.
    """
    files, error = _open_on_main(Path(path).expanduser(), world)
    wanted = {name: full_shape(tensor) for name, tensor in _tensors(model).items()}
    shapes: Mapping[str, list[int]] | None
    shapes, error = world.broadcast((None if files is None else files.shapes, error))
    if error is not None or shapes is None:
        raise RunError(f"train.init_from cannot be read: {error}")
    different = [n for n in sorted({*wanted, *shapes}) if wanted.get(n) != shapes.get(n)]
    for name in different:
        if not name.startswith(_HEAD):
            raise RunError(
                f"train.init_from is {path}, whose weights are of another model: {name} is "
                f"{shapes.get(name, 'absent')} there and {wanted.get(name, 'absent')} in this "
                "config; make model.* the same"
            )
    left = [name for name in wanted if different and name.startswith(_HEAD)]
    for name, tensor in _tensors(model).items():
        if name not in left:
            _set(tensor, None if files is None else files.read(name), world)
    return left


def _open_on_main(path: Path, world: World) -> tuple[WeightFiles | None, str | None]:
    if not world.is_main:
        return None, None
    try:
        return open_weights(path), None
    except (ValueError, OSError, SafetensorError) as error:
        return None, str(error)


@torch.no_grad()
def _set(tensor: Tensor, value: Tensor | None, world: World) -> None:
    """Set a tensor of every rank to rank 0's `value`.

    NOTE: a collective; every rank walks the tensors in the same order.
    """
    sharded = hasattr(tensor, "ds_id")
    gathered = deepspeed.zero.GatheredParameters([tensor], modifier_rank=0)
    with gathered if sharded else nullcontext():
        if value is not None:
            tensor.copy_(value)
    if not sharded:
        on_device = tensor.to(world.device)
        dist.broadcast(on_device, src=0)
        tensor.copy_(on_device)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _open_export(path: Path) -> WeightFiles:
    read_config(path)
    file: Any = safe_open(path / WEIGHTS_FILE, framework="pt")  # the library has no types
    names: list[str] = file.keys()
    shapes = {name: list(file.get_slice(name).get_shape()) for name in names}
    return WeightFiles(shapes, file.get_tensor)


def _open_checkpoint(directory: Path) -> WeightFiles:
    state = open_zero_state(directory, read_trainer_state(directory))
    shapes = {name: list(buffer.shape) for name, buffer in state.buffers.items()}

    def read(name: str) -> Tensor:
        return state.buffers[name] if name in state.buffers else state.full(name)

    return WeightFiles({**state.shapes, **shapes}, read)
