"""The rules of all parameters, in one place: initial value, weight decay, layer, bias in timm.

A module class declares the rules of its parameters in `parameter_rules`, by dotted name from the
module: {"mask_token": LEARNED_TOKEN, "qkv.weight": matrix(stacked=3)}. An outer module may declare
another rule for a parameter inside it. Linear layers and layer norms need no declaration.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

GROUPS = ("body", "head", "none")
"""The weight-decay groups, in the order of the optimizer: matrices of the body, matrices of a
classifier's head (Zhai et al. 2022, section 3.1), and parameters that never decay."""
InitialValue: TypeAlias = Callable[[Sequence[int], torch.Generator], Tensor]
"""Function of the full shape and a random generator; returns the initial value (fp32, CPU)."""
_BLOCK = re.compile(r"(?:(.*)\.)?blocks\.(\d+)\.")
"""Pattern of a parameter's name in a block: the tower and the number of the block."""


@dataclass(frozen=True)
class ParameterRule:
    """Initial value and weight decay of a parameter, and whether timm has a bias beside it."""

    initial: InitialValue
    group: str = "none"
    """Weight-decay group, one of `GROUPS`."""
    bias_in_timm: bool = False
    """Whether timm's module always has a bias beside this weight, though ours may have none."""
    parts: tuple[int, ...] = (1,)
    """Proportions of the matrices that the weight stacks by rows: (1, 1, 1) for q, k and v."""


Rules: TypeAlias = Mapping[str, ParameterRule]
"""Rules by dotted name from the module that declares them."""


def constant(value: float) -> ParameterRule:
    """Return the rule of a parameter that starts at one value and never decays."""
    return ParameterRule(lambda shape, _: torch.full(tuple(shape), value))


def normal(
    deviation: float | Callable[[Sequence[int]], float], group: str = "none"
) -> ParameterRule:
    """Return the rule of values from a normal distribution, cut at two deviations.

    Args:
        deviation: standard deviation, or a function of the full shape that returns it.
        group: weight-decay group.
    """

    def initial(shape: Sequence[int], generator: torch.Generator) -> Tensor:
        std = deviation(shape) if callable(deviation) else deviation
        value = torch.empty(tuple(shape))
        nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std, generator=generator)
        return value

    return ParameterRule(initial, group)


def matrix(*, stacked: int = 1) -> ParameterRule:
    """Return the rule of a matrix with equal variance forward and backward.

    Glorot and Bengio 2010; `stacked` projections are concatenated by rows, as in q, k and v.
    """
    rule = normal(lambda shape: math.sqrt(2 / (shape[0] // stacked + shape[1])), "body")
    return replace(rule, parts=(1,) * stacked)


def biased_in_timm(rule: ParameterRule) -> ParameterRule:
    """Return `rule` for a weight beside which timm's module always has a bias."""
    return replace(rule, bias_in_timm=True)


MATRIX = matrix()
INPUT_MATRIX = normal(lambda shape: shape[1] ** -0.5, "body")
"""Rule of a matrix whose outputs have the variance of its inputs, such as the patch projection."""
CLASSIFIER = normal(0.02, "head")
"""Rule of a classifier's head, with small initial values."""
EMBEDDING_HEAD = normal(0.02, "body")
"""Rule of a head into a space of embeddings, with small initial values."""
LEARNED_TOKEN = normal(0.02)
"""Rule of a class token or register."""
ZEROS, ONES = constant(0.0), constant(1.0)

_OF_TYPE: dict[type[nn.Module], Rules] = {
    nn.Linear: {"weight": MATRIX, "bias": ZEROS},
    nn.LayerNorm: {"weight": ONES, "bias": ZEROS},
}


def parameter_rules(model: nn.Module) -> dict[str, ParameterRule]:
    """Return the rule of every parameter by name, in the order of the module.

    Raises:
        ValueError: no module declares a rule for a parameter; the message names it.
    """
    return {name: _rule(model, name) for name, _ in model.named_parameters()}


def _rule(model: nn.Module, name: str) -> ParameterRule:
    """Return the rule that the outermost module declares for the parameter `name`."""
    module, rest = model, name
    while True:
        declared: Rules | None = getattr(module, "parameter_rules", None)
        if declared is None:
            declared = next((r for kind, r in _OF_TYPE.items() if isinstance(module, kind)), {})
        if rest in declared:
            return declared[rest]
        child, dot, rest_below = rest.partition(".")
        if not dot:
            raise ValueError(
                f"parameter {name} has no rule for its initial value and weight decay: declare "
                f"{rest!r} in parameter_rules of {type(module).__name__}"
            )
        module, rest = module.get_submodule(child), rest_below


def layers_above(names: Iterable[str]) -> dict[str, int]:
    """Return the number of layers between each parameter and the output, by name.

    It is 0 for norm, pooling and head, 1 for the last block, and for the embedding of patches or
    tokens one more than for the first block. Each encoder of a model counts its own blocks.

    Args:
        names: names of all parameters of the model.
    """
    names = list(names)
    blocks = {match.groups() for name in names if (match := _BLOCK.match(name))}
    depth = Counter(tower for tower, _ in blocks)
    above = {}
    for name in names:
        above[name] = 0
        if match := _BLOCK.match(name):
            above[name] = depth[match[1]] - int(match[2])
        elif "embeds" in (parts := name.split(".")):
            above[name] = depth[".".join(parts[: parts.index("embeds")]) or None] + 1
    return above


def block_matrices(model: nn.Module) -> dict[str, list[int]]:
    """Return the 2-D weights of transformer blocks by name, each with the rows of its matrices.

    A weight that stacks q, k and v has three; most have one. Norms, biases and gains are left out.
    """
    rules = parameter_rules(model)
    found = {}
    for name, parameter in model.named_parameters():
        shape, parts = full_shape(parameter), rules[name].parts
        if _BLOCK.match(name) and len(shape) == 2 and rules[name].group == "body":
            found[name] = [shape[0] * part // sum(parts) for part in parts]
    return found


def full_shape(parameter: Tensor) -> list[int]:
    """Return the full shape of a parameter, even if ZeRO-3 has left only a shard of it."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def parameter_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Return name and full shape of every parameter, frozen or not, in the order of the module."""
    return {name: full_shape(p) for name, p in module.named_parameters()}
