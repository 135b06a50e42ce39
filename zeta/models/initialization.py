"""Initial weights as a pure function of (seed, parameter name, shape).

Every parameter has a random stream of its own, drawn on the CPU, so that the weights depend
neither on the device, the world size, nor the order in which parameters are materialised: a model
built on the meta device can be filled one parameter at a time, on any rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from zeta.models.layers import LayerScale, LogitScale
from zeta.models.parameters import full_shape
from zeta.models.position import initial_table


def initial_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Return the initial value (fp32, CPU) of the parameter of this dotted name.

    Norm weights are 1 and biases 0; position tables are smooth with unit variance
    (`initial_table`); matrices are drawn for even variance forward and backward (Glorot and Bengio
    2010), patch projection and token table for tokens of unit variance; heads start small.
    """
    generator = torch.Generator().manual_seed(_stream(name, seed))
    leaf = name.rsplit(".", 1)[-1]
    leaf_module = name.split(".")[-2] if "." in name else ""
    if leaf in ("pos_embed_y", "pos_embed_x", "pos_embed_text"):
        return initial_table(shape[1], shape[2], generator)[None]
    if leaf == "pos_embed":
        rows, columns = (initial_table(n, shape[3], generator) for n in shape[1:3])
        return (rows[:, None] + columns)[None] / math.sqrt(2)
    if leaf in ("bias", "mlp_bias"):
        return torch.zeros(shape)
    if leaf == "weight" and len(shape) == 1:
        return torch.ones(shape)
    if leaf == "latent":
        deviation = shape[-1] ** -0.5
    elif leaf in ("reg_token", "cls_token") or leaf_module == "head":
        deviation = 0.02
    elif leaf == "token_embed":
        deviation = 1.0
    elif name.endswith("embeds.proj.weight") or leaf_module == "in_proj":
        deviation = shape[1] ** -0.5
    elif len(shape) == 2:
        deviation = math.sqrt(2 / (_outputs(name, shape) + shape[1]))
    else:
        raise ValueError(f"parameter {name} of shape {tuple(shape)} has no initialisation rule")
    value = torch.empty(shape)
    nn.init.trunc_normal_(
        value, std=deviation, a=-2 * deviation, b=2 * deviation, generator=generator
    )
    return value


def initial_values(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, initial value) of every parameter of `model`, one at a time."""
    for name, parameter in model.named_parameters():
        yield name, _value(model, name, torch.Size(full_shape(parameter)), seed)


def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` but those on the meta device and those already sharded."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_meta and full_shape(parameter) == list(parameter.shape):
                parameter.copy_(_value(model, name, parameter.shape, seed))


def _value(model: nn.Module, name: str, shape: torch.Size, seed: int) -> Tensor:
    """The values that are options of their layer are the scales'; else `initial_value`."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, LayerScale):
        return torch.full(shape, owner.initial)
    if isinstance(owner, LogitScale):
        return torch.full(shape, owner.initial[leaf])
    return initial_value(name, shape, seed)


def _outputs(name: str, shape: torch.Size) -> int:
    """Rows of one projection, where a matrix stacks several (q, k, v)."""
    if name.endswith(".qkv.weight"):
        return shape[0] // 3
    return shape[0] // 2 if name.endswith(".kv.weight") else shape[0]


def _stream(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
