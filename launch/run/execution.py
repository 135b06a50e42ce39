"""Choose the settings of a run that are auto, from the memory of its ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from itertools import islice

import torch

from data_pipeline.loading.executor import Executor
from data_pipeline.loading.recipe import pack_recipe
from data_pipeline.plan.lane_packer import PackPlan
from data_pipeline.plan.packing import image_costs
from data_pipeline.plan.plan import Plan
from data_pipeline.plan.sampling import at_highest_rate
from launch.config.load import ZetaConfig
from launch.config.resolve import training_plan
from launch.run.checks import CheckedRun, abstract_model
from zeta.distributed import World
from zeta.exit_codes import RunError
from zeta.models.layers import set_checkpointing
from zeta.objectives import JointObjective, Objective, build_objective, objective_class
from zeta.objectives.frozen import FrozenModule
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
    attention grows with the squares of the lengths. Where dropped patches are looked at too, the
    memory differs: it is the pack of the most of them, at the highest rate of the drop schedules.
    """
    config = checked.config
    declared = objective_class(config.objective.kind)
    if declared.whole_images:
        plan = training_plan(_dropping_most(config), checked.manifest)
        beside = declared.outline_beside(config.objective) or FrozenModule()
        worst = max(_first_packs(plan, 128), key=lambda pack: _whole_rows(plan, pack, beside))
    else:
        plan = checked.plan
        worst = max(_first_packs(plan, 32), key=lambda pack: _cost(plan, pack))
    executor = Executor(checked.manifest.class_names, config.data.read_deadline_s)
    return executor.execute(pack_recipe(plan, worst, epoch=0)).batch


def _first_packs(plan: Plan, most: int) -> list[PackPlan]:
    """Return the first packs of the first lane that has any: a small data set leaves some empty."""
    lanes = (plan.lane(number) for number in range(plan.num_lanes))
    return next(packs for lane in lanes if (packs := list(islice(lane, most))))


def _cost(plan: Plan, pack: PackPlan) -> float:
    """Return the cost of a pack's forward pass."""
    return float(image_costs(pack.lengths, plan.cost_dim).sum())


def _whole_rows(plan: Plan, pack: PackPlan, beside: FrozenModule) -> int:
    """Return the rows of what runs beside the model on the whole images of a pack."""
    grids = list(zip(pack.rows.tolist(), pack.columns.tolist(), strict=True))
    return beside.rows(grids, plan.patch_size)


def _dropping_most(config: ZetaConfig) -> ZetaConfig:
    """Return the config with the drop rates at which packs hold the most images."""
    data = config.data
    local = replace(data.local, drop=at_highest_rate(data.local.drop))
    return replace(config, data=replace(data, drop=at_highest_rate(data.drop), local=local))


def device_memory(world: World) -> float:
    """Return the bytes of this rank's device; on a CPU, its share of the memory of the machine."""
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return machine / world.info.local_world_size


def _without_offload(train: TrainConfig) -> TrainConfig:
    whole = {k: v for k, v in train.deepspeed.items() if k != "zero_optimization"}
    return replace(train, zero_stage=0, deepspeed=whole)
