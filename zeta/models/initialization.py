"""Initial weights as a pure function of (seed, parameter name, shape).

Every parameter has its own random stream, drawn on the CPU, so the weights do not depend on the
device, the world size or the order in which parameters are filled: a model built on the meta device
can be filled one parameter at a time, on any rank. The distributions come from the parameters'
rules, see `zeta.models.parameters`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from zeta.models.parameters import full_shape, parameter_rules


def initial_values(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, initial value in fp32 on the CPU) of every parameter, one at a time.

    Raises:
        ValueError: a parameter without a rule, by name.
    """
    parameters = dict(model.named_parameters())
    for name, rule in parameter_rules(model).items():
        yield name, rule.initial(full_shape(parameters[name]), _stream(name, seed))


def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` except those on the meta device or already sharded."""
    parameters = dict(model.named_parameters())
    rules = parameter_rules(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if not parameter.is_meta and full_shape(parameter) == list(parameter.shape):
                parameter.copy_(rules[name].initial(parameter.shape, _stream(name, seed)))


def _stream(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
