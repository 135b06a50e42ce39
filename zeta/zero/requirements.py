"""The parts of DeepSpeed that zeta relies on, checked when a run starts.

Most of them are private to DeepSpeed, so even a supported version may lack them. It is refused
here, before the first step, with a message that names the missing part and the version to install.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from pkgutil import resolve_name
from typing import Any

from torch import nn

from zeta.distributed import World
from zeta.exit_codes import RunError
from zeta.models.parameters import full_shape
from zeta.run.requirements import DEEPSPEED, check_installed
from zeta.zero.protocol import OwnedRange

_LIBRARY = (
    "init_distributed",
    "initialize",
    "zero.Init",
    "zero.GatheredParameters",
    "ops.__compatible_ops__",
    "utils.set_z3_leaf_modules",
    "comm.comm.cdb",
    "comm.destroy_process_group",
    "runtime.checkpoint_engine.checkpoint_engine.CheckpointEngine",
    # The records in its files that are not tensors.
    "runtime.fp16.loss_scaler.LossScaler",
    "runtime.zero.config.ZeroStageEnum",
    "utils.tensor_fragment.fragment_address",
)
_ENGINE = (
    "_copy_recovery_script",
    "backward",
    "checkpoint_engine",
    "coalesce_grad_reduction",
    "module",
    "optimizer.param_groups",
    "save_checkpoint",
    "set_gradient_accumulation_boundary",
    "step",
    "zero_grad",
)
_SHARDED = (
    "optimizer.averaged_gradients",
    "optimizer.optimizer.state",
    "optimizer.reset_cpu_buffers",
    "optimizer.zero_grad",
)
_STAGES_1_2 = (
    "optimizer.micro_step_id",
    "optimizer.single_partition_of_fp32_groups",
    "optimizer.update_lp_params",
)
_STAGE_3 = (
    "optimizer.checkpoint_event_epilogue",
    "optimizer.checkpoint_event_prologue",
    "optimizer.fp16_groups",
    "optimizer.fp16_partitioned_groups_flat",
    "optimizer.fp32_partitioned_groups_flat",
)
_ENGINE_OF_STAGE = {
    0: _ENGINE,
    1: _ENGINE + _SHARDED + _STAGES_1_2,
    2: _ENGINE + _SHARDED + _STAGES_1_2,
    3: _ENGINE + _SHARDED + _STAGE_3,
}
_PARAMETER_OF_STAGE: dict[int, tuple[str, ...]] = {
    0: (),
    1: ("_hp_mapping",),
    2: ("_hp_mapping",),
    3: ("ds_id", "ds_numel", "ds_shape", "partition_numel"),
}
_MAPPING = ("hp_fragment_address.start", "lp_fragment_address.numel", "param_group_index")


@cache
def check_library() -> None:
    """Check the version of DeepSpeed, and the names that zeta imports from it.

    Raises:
        RunError: the version is not supported, or a name is missing.
    """
    check_installed(DEEPSPEED)
    _refuse([f"deepspeed.{name}" for name in _LIBRARY if not _is_there(f"deepspeed.{name}")])


def check_engine(engine: Any, stage: int) -> None:
    """Check a `DeepSpeedEngine`, its optimizer and its parameters for what zeta reads or sets.

    Raises:
        RunError: an attribute is missing.
    """
    missing = _missing("engine", engine, _ENGINE_OF_STAGE[stage])
    for parameter in (p for p in engine.module.parameters() if p.requires_grad):
        missing += _missing("parameter", parameter, _PARAMETER_OF_STAGE[stage])
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            missing += _missing("parameter._hp_mapping", mapping, _MAPPING)
    _refuse(missing)


def check_ranges(ranges: Sequence[OwnedRange], module: nn.Module, world: World) -> None:
    """Check that the ranges of all ranks together are the trainable weights; a collective.

    Raises:
        RunError: they are not, because this DeepSpeed lays out its fp32 partitions differently.
    """
    owned = world.sum([sum(owned.length for owned in ranges)])[0]
    wanted = sum(math.prod(full_shape(p)) for p in module.parameters() if p.requires_grad)
    if owned != wanted:
        _refuse([f"fp32 partitions of {wanted} weights (they have {owned:.0f})"])


def _missing(owner: str, root: Any, names: Iterable[str]) -> list[str]:
    return [f"{owner}.{name}" for name in names if not _has(root, name)]


def _has(root: Any, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(root, part):
            return False
        root = getattr(root, part)
    return True


def _is_there(name: str) -> bool:
    try:
        resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def _refuse(missing: Sequence[str]) -> None:
    """Raise RunError if anything is missing."""
    if not missing:
        return
    import deepspeed

    found = list(dict.fromkeys(missing))
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    raise RunError(
        f"deepspeed {deepspeed.__version__} is installed, which lacks {', '.join(found[:3])}{more} "
        f"that zeta relies on: pip install '{DEEPSPEED}'"
    )
