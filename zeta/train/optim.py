"""Build the optimizer of a run, with weight-decay groups and lower rates in earlier layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from zeta.config_field import AUTO
from zeta.models.parameters import GROUPS, block_matrices, layers_above, parameter_rules
from zeta.train.config import OptimConfig, TrainConfig
from zeta.train.optimizers.muon import ROWS
from zeta.train.optimizers.table import (
    OPTIMIZERS,
    highest_stage,
    needs_whole_matrices,
    takes_betas,
)


def layer_scales(names: Iterable[str], decay: float) -> dict[str, float]:
    """Return the factor on the learning rate of each parameter (Clark et al. 2020, "ELECTRA").

    The last norm, pooling and head learn at the full rate, and each layer before at `decay` times
    the rate of the next, see `zeta.models.parameters.layers_above`.

    Args:
        names: of all parameters of the model.
        decay: 1 is one rate for all.
    """
    return {name: decay**layers for name, layers in layers_above(names).items()}


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Split the trainable parameters of `module` by weight decay, and each part by layer.

    Empty groups are left out. A group's `lr_scale` is its factor on the learning rate. For an
    optimizer of whole matrices those of the blocks have groups of their own, with their `rows`. The
    order of the parameters does not depend on `config`.
    """
    head = config.head_weight_decay
    body = config.weight_decay
    rates = {"body": body, "head": body if head is None else head, "none": 0.0}
    parameters = dict(module.named_parameters())
    rules = parameter_rules(module)
    scales = layer_scales(parameters, config.layer_decay)
    matrices = block_matrices(module) if needs_whole_matrices(config.kind) else {}
    of_group: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            of_group[rules[name].group].append(name)
    groups: list[dict[str, Any]] = []
    for group, members in of_group.items():
        for (scale, whole), same in groupby(members, lambda name: (scales[name], name in matrices)):
            names = list(same)
            values = [parameters[name] for name in names]
            groups.append({"params": values, "weight_decay": rates[group], "lr_scale": scale})
            if whole:
                groups[-1][ROWS] = [matrices[name] for name in names]
    return groups


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer `config.kind` over `module`; its rates are set before every step.

    Raises:
        ValueError: `module` has nothing to train, or the optimizer refuses `config.params`.
    """
    groups = parameter_groups(module, config)
    if not groups:
        raise ValueError("the model has no trainable parameter")
    if needs_whole_matrices(config.kind) and not any(ROWS in group for group in groups):
        raise ValueError(_no_matrix(config.kind))
    # fused: one pass over memory instead of one per operation of Adam's update.
    own: dict[str, Any] = {"fused": True} if config.kind == "adamw" else {}
    if takes_betas(config.kind):
        own["betas"] = config.betas
    with _refusals_named(config):
        return OPTIMIZERS[config.kind](groups, lr=config.lr, **own | config.params)


def check_optimizer(config: OptimConfig, train: TrainConfig) -> None:
    """Raise ValueError, naming the fields, unless the optimizer can be built, and step, as set."""
    check_stage(config, train)
    if needs_whole_matrices(config.kind) and train.trainable == "head":
        raise ValueError(f"{_no_matrix(config.kind)}, which train.trainable=head leaves out")
    _values_kept(config)


def check_stage(config: OptimConfig, train: TrainConfig) -> None:
    """Raise ValueError, naming the fields, if `train` shards weights that must be whole."""
    highest = highest_stage(config.kind)
    if train.lowest_stage <= highest:
        return
    asked, fix = f"train.zero_stage={train.zero_stage}", f"train.zero_stage={highest} or auto"
    if train.zero_stage == AUTO:
        asked = "train.deepspeed.zero_optimization.offload_optimizer"
        fix = "it to null"
    raise ValueError(
        f"optim.kind is {config.kind}, which needs the matrices whole, but {asked} asks for parts "
        f"of them on each rank: set {fix}, or optim.kind=adamw"
    )


def state_per_weight(config: OptimConfig, model: nn.Module) -> float:
    """Return the number of values that the optimizer keeps for a weight of `model` that learns.

    It is the mean over those weights: two in AdamW, one in Muon for the matrices of blocks.
    """
    of_matrix, of_other = _values_kept(config)
    matrices = block_matrices(model)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    in_matrices = sum(size for name, size in sizes.items() if name in matrices)
    total = sum(sizes.values())
    return (of_matrix * in_matrices + of_other * (total - in_matrices)) / max(total, 1)


class _Probe(nn.Module):
    """A model with one matrix in a block, and one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(32, 32, bias=False)])
        self.head = nn.Linear(32, 32, bias=False)


def _values_kept(config: OptimConfig) -> tuple[int, int]:
    """Return the values kept for a weight of a block's matrix, and of another, after a step."""
    with torch.random.fork_rng([]):
        probe = _Probe()
    optimizer = build_optimizer(probe, config)
    for parameter in probe.parameters():
        parameter.grad = torch.ones_like(parameter)
    with _refusals_named(config):  # some arguments are looked at in a step only
        optimizer.step()
    of_matrix, of_other = (
        sum(isinstance(v, Tensor) and v.numel() == p.numel() for v in optimizer.state[p].values())
        for p in probe.parameters()
    )
    return of_matrix, of_other


def _no_matrix(kind: str) -> str:
    return (
        f"optim.kind is {kind}, but no matrix of a transformer block learns: set optim.kind=adamw, "
        "or train the blocks"
    )


@contextmanager
def _refusals_named(config: OptimConfig) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"optim.params is {config.params}, which the optimizer {config.kind} refuses: {error}"
        ) from error
