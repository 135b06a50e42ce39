"""Choose the settings of a run that are auto, from the memory of its ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from data_pipeline.loading.executor import Executor
from data_pipeline.loading.recipe import pack_recipe
from data_pipeline.plan.lane_packer import PackPlan
from data_pipeline.plan.packing import image_costs
from launch.config.load import ZetaConfig
from launch.run.checks import CheckedRun, abstract_model
from zeta.distributed import World
from zeta.exit_codes import RunError
from zeta.models.layers import set_checkpointing
from zeta.objectives import JointObjective, Objective, build_objective, objective_class
from zeta.packed import PackedBatch, packs_per_rank
from zeta.train.config import TrainConfig
from zeta.train.execution import Execution, Need, Shape, choose_execution
from zeta.train.graphs.choice import graph_obstacle
from zeta.train.memory_model import (
    ActivationMemory,
    StateMemory,
    activation_memory,
    bytes_beside,
    state_memory,
    sum_of_outputs,
)
from zeta.train.optim import state_per_weight
from zeta.train.optimizers.table import highest_stage

_PACKS_LOOKED_AT = 32


@dataclass(frozen=True)
class RunMemory:
    """The sizes from which the memory of a run is predicted."""

    sizes: list[int]
    """Elements of each parameter that learns."""
    frozen: list[int]
    """Elements of each parameter that does not."""
    moments: float
    """Values that the optimizer keeps of a weight, in the mean."""
    activations: ActivationMemory
    """Activations of one pack; zero if they were not counted, as on a CPU."""
    beside: int = 0
    """Bytes of the weights of what runs beside the model."""
    recorded: bool = False
    """Whether passes may be recorded as CUDA graphs."""

    def states(self, train: TrainConfig, stage: int, world_size: int) -> int:
        """Return the bytes besides activations at a ZeRO stage."""
        settings = replace(train, zero_stage=stage) if stage else _without_offload(train)
        return self.state_memory(settings, world_size).total

    def state_memory(self, train: TrainConfig, world_size: int) -> StateMemory:
        """Return the memory of a rank besides activations, by kind."""
        return state_memory(
            self.sizes,
            train,
            world_size,
            self.frozen,
            self.moments,
            self.beside,
            recorded=self.recorded,
        )


def settle(
    checked: CheckedRun, objective: Objective, world: World
) -> tuple[TrainConfig, Execution]:
    """Return the settings of training with nothing left to choose; a collective.

    Raises:
        ValueError: what they ask for does not fit into the memory of a rank.
    """
    train, data = checked.config.train, checked.config.data
    on_cuda = world.device.type == "cuda"
    memory = int(min(world.gather(device_memory(world))))
    counted, failure = None, None
    if world.is_main:
        try:
            counted = run_memory(checked, costliest_pack(checked) if on_cuda else None)
        except (OSError, ValueError, RunError) as error:
            failure = error
    if not world.all(failure is None):
        world.raise_together(failure)
    sizes: RunMemory = world.broadcast(counted)
    shape = Shape(
        packs=packs_per_rank(train.packs_per_step, world.size),
        token_budget=data.token_budget,
        width=checked.config.model.resolve()["dim"],
        joint=isinstance(objective, JointObjective),
    )
    need = Need(lambda stage: sizes.states(train, stage, world.size), sizes.activations.peak)
    chosen = choose_execution(train, need, shape, memory, highest_stage(checked.config.optim.kind))
    tokens = chosen.packs * data.token_budget
    return replace(train, zero_stage=chosen.stage, tokens_per_forward=tokens), chosen


def run_memory(checked: CheckedRun, pack: PackedBatch | None) -> RunMemory:
    """Return the sizes of a run.

    Args:
        checked: the run.
        pack: a decoded pack, whose activations are counted, which takes seconds for a large model;
            None: they are not counted.
    """
    config = checked.config
    model = abstract_model(config)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    frozen = [p.numel() for p in model.parameters() if not p.requires_grad]
    moments = state_per_weight(config.optim, model)
    beside = objective_class(config.objective.kind).outline_beside(config.objective)
    weights = bytes_beside(beside, config.train.dtype)
    activations = ActivationMemory(0, 0)
    if pack is not None:
        set_checkpointing(model, config.train.activation_checkpointing)
        activations = activation_memory(model, pack, sum_of_outputs, config.train.dtype, beside)
    recorded = pack is not None and may_record(config)
    return RunMemory(sizes, frozen, moments, activations, weights, recorded)


def may_record(config: ZetaConfig) -> bool:
    """Return whether a GPU may record passes; the size of the model may decide against it."""
    objective = build_objective(config.objective, config.model.resolve()["num_classes"])
    train, device = replace(config.train, zero_stage=0), torch.device("cuda")
    may = config.train.cuda_graph != "false" and config.train.device != "cpu"
    return may and graph_obstacle(train, abstract_model(config), objective, device) is None


def costliest_pack(checked: CheckedRun) -> PackedBatch:
    """Return the most expensive of the first packs of a lane, decoded.

    All packs have the same shapes, tail padding included, and so take the same memory; the time of
    attention grows with the squares of the lengths.
    """
    packs: list[PackPlan] = []
    for number in range(checked.plan.num_lanes):  # a small data set leaves some lanes empty
        lane = checked.plan.lane(number)
        packs = [pack for _ in range(_PACKS_LOOKED_AT) if (pack := lane.next_pack()) is not None]
        if packs:
            break
    cost_dim = checked.plan.cost_dim
    worst = max(packs, key=lambda pack: float(image_costs(pack.lengths, cost_dim).sum()))
    executor = Executor(checked.manifest.class_names, checked.config.data.read_deadline_s)
    return executor.execute(pack_recipe(checked.plan, worst, epoch=0)).batch


def device_memory(world: World) -> float:
    """Return the bytes of this rank's device; on a CPU, its share of the memory of the machine."""
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return machine / world.info.local_world_size


def _without_offload(train: TrainConfig) -> TrainConfig:
    whole = {k: v for k, v in train.deepspeed.items() if k != "zero_optimization"}
    return replace(train, zero_stage=0, deepspeed=whole)
