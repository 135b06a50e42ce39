"""`train.init_from`: begin a run at the weights of another run, checkpoint or export."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from zeta.checkpoint.directory import open_zero_state, read_trainer_state
from zeta.distributed import World
from zeta.exit_codes import RunError
from zeta.models.parameters import full_shape
from zeta.models.trainable import frozen_names
from zeta.train.init_sources import OpenWeights, head_to_leave, open_weights


def load_initial_weights(
    model: nn.Module, path: str, world: World, *, new_head: bool = False
) -> tuple[list[str], str]:
    """Set the weights and buffers of `model` to those at `path`, which rank 0 reads for all.

    Every rank calls this together, with a whole model or one that is sharded by `zero.Init`. A head
    of another shape (other classes) keeps its initial values; with `new_head` any head begins at
    zero: the initial values of the same seed may be those that the weights were trained with.

    Returns:
        Names of the parameters of the head that were not taken from there; and what else was not
        taken as it is there, in words.

    Raises:
        RunError: nothing to read there, or weights of another model; on every rank alike.
    """
    wanted = {name: full_shape(tensor) for name, tensor in _tensors(model).items()}
    opened, error = _open_on_main(Path(path).expanduser(), wanted, world)
    found = None if opened is None else (opened.shapes, opened.options, opened.note)
    found, error = world.broadcast((found, error))
    if error is not None or found is None:
        raise RunError(f"train.init_from cannot be read: {error}")
    shapes, options, note = found
    left = head_to_leave(wanted, shapes, path, new_head=new_head, options=options)
    for name, tensor in _tensors(model).items():
        if name not in left:
            _set(tensor, None if opened is None else opened.tensors[name].read(), world)
        elif new_head:
            _set(tensor, torch.zeros(wanted[name]) if world.is_main else None, world)
    return left, note


def load_frozen_weights(model: nn.Module, checkpoint: Path, world: World) -> None:
    """Set the frozen parameters of `model` to those of a verified checkpoint of the same model.

    What learns is loaded with its optimizer state, once there is an optimizer.
    Every rank calls this together, with a whole model or one that is sharded by `zero.Init`.
    """
    parameters = dict(model.named_parameters())
    state = None
    if world.is_main:
        state = open_zero_state(checkpoint, read_trainer_state(checkpoint))
    for name in frozen_names(model):
        _set(parameters[name], None if state is None else state.full(name), world)


def _open_on_main(
    path: Path, wanted: Mapping[str, list[int]], world: World
) -> tuple[OpenWeights | None, str | None]:
    if not world.is_main:
        return None, None
    try:
        return open_weights(path, wanted), None
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
