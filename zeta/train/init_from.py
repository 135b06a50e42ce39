"""`train.init_from`: start a run from the weights of another run, checkpoint or export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from zeta.checkpoint.directory import open_zero_state, read_trainer_state
from zeta.distributed import World
from zeta.exit_codes import RunError
from zeta.models.parameters import full_shape
from zeta.models.trainable import frozen_names
from zeta.train.init_sources import (
    OpenWeights,
    encoder_prefix,
    head_to_leave,
    open_weights,
    parts_to_leave,
)
from zeta.train.same_options import compare_options, encoder_arguments
from zeta.zero.build import set_from_main


def load_initial_weights(
    model: nn.Module, path: str, world: World, *, new_head: bool = False
) -> tuple[list[str], str]:
    """Set the weights and buffers of `model` to those at `path`, which rank 0 reads for all.

    Every rank calls this together, with a whole model or one that is built in shards. A head of
    another shape (other classes) keeps its initial values. With `new_head` any head starts at zero,
    because with the same seed the initial values may be those of the earlier training. A model of
    several parts takes its encoder from an encoder; the other parts keep their initial values.

    Returns:
        Names of the head's parameters that were not taken from `path`; and a note on anything else
        that differs from the files there, for the user.

    Raises:
        RunError: `path` has no weights, or those of another model; raised on every rank.
    """
    wanted = {name: full_shape(tensor) for name, tensor in _tensors(model).items()}
    opened, error = _open_on_main(Path(path).expanduser(), wanted, world)
    found = None
    if opened is not None:
        found = (opened.shapes, opened.options, opened.note, opened.arguments)
    found, error = world.broadcast((found, error))
    if error is not None or found is None:
        raise RunError(f"train.init_from cannot be read: {error}")
    shapes, options, note, there = found
    left = head_to_leave(wanted, shapes, path, new_head=new_head, options=options)
    own = encoder_arguments(model, encoder_prefix(wanted))
    note = "; ".join(filter(None, (compare_options(there, own, path, options=options), note)))
    anew = parts_to_leave(wanted, shapes)
    if anew:
        note = "; ".join(filter(None, (_say_parts(anew, encoder_prefix(wanted)), note)))
    for name, tensor in _tensors(model).items():
        if name in anew:
            continue
        if name not in left:
            set_from_main(tensor, None if opened is None else opened.tensors[name].read(), world)
        elif new_head:
            set_from_main(tensor, torch.zeros(wanted[name]), world)
    return left, note


def load_frozen_weights(model: nn.Module, checkpoint: Path, world: World) -> None:
    """Set the frozen parameters of `model` to those of a verified checkpoint of the same model.

    The other parameters are loaded later, together with their optimizer state.
    Every rank calls this together, with a whole model or one that is built in shards.
    """
    parameters = dict(model.named_parameters())
    state = None
    if world.is_main:
        state = open_zero_state(checkpoint, read_trainer_state(checkpoint))
    for name in frozen_names(model):
        set_from_main(parameters[name], None if state is None else state.full(name), world)


def _open_on_main(
    path: Path, wanted: Mapping[str, list[int]], world: World
) -> tuple[OpenWeights | None, str | None]:
    if not world.is_main:
        return None, None
    try:
        return open_weights(path, wanted), None
    except (ValueError, OSError, RunError, SafetensorError) as error:
        return None, str(error)


def _say_parts(anew: Iterable[str], encoder: str) -> str:
    parts = sorted({n.partition(".")[0] for n in anew if not n.startswith(encoder)})
    return f"its image encoder alone: {', '.join(parts)} and the head keep their initial values"


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
