"""`train.deepspeed`: settings of DeepSpeed that zeta leaves to the user, checked for conflicts.

DeepSpeed itself ignores a top-level key that it does not know, and would let many settings undo
what zeta promises (the exact mean, the finite check, whole checkpoints). So only keys that are
known to work with zeta's loop pass; any other is refused with the zeta field that decides it, or
with the nearest name.

Values of the wrong type are refused here too, not by DeepSpeed's own pydantic models: a config is
checked by commands that never load DeepSpeed, which takes 3 s and chooses its accelerator from the
environment as soon as it is imported, before zeta has set that.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from zeta.config_field import check_range

_LOOP = "zeta's training loop, which has no such feature"
_MEAN = "the exact mean over all images of the step"
_CHECKPOINTS = "zeta's checkpoints, which no longer fit"
_FINITE = "zeta's finite check and clipping (optim.clip), which need the whole gradient"

_SIZES = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
)
"""Keys of `zero_optimization` with numbers; the others, except the offload, are true or false."""

_ALLOWED: dict[str, tuple[str, ...] | None] = {
    "zero_optimization": (
        *_SIZES,
        "contiguous_gradients",
        "reduce_scatter",
        "use_multi_rank_bucket_allreduce",
        "allgather_partitions",
        "overlap_comm",
        "offload_optimizer",
        "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential",
        "round_robin_gradients",
        "memory_efficient_linear",
        "log_trace_cache_warnings",
        "enable_sanity_checks",
    ),
    "comms_logger": None,
    "flops_profiler": None,
    "wall_clock_breakdown": None,
    "memory_breakdown": None,
    "dump_state": None,
    "disable_allgather": None,
    "disable_python_gc": None,
    "log_level": None,
    "timers": None,
}
"""Accepted keys, each with the accepted keys below it (None: any)."""

_DECIDED = {
    "train_batch_size": "train.packs_per_step",
    "train_micro_batch_size_per_gpu": "data.token_budget",
    "gradient_accumulation_steps": "train.packs_per_step",
    "managed_gradient_accumulation": "train.packs_per_step",
    "gradient_clipping": "optim.clip",
    "scheduler": "optim.schedule",
    "fp16": "train.dtype",
    "bf16": "train.dtype",
    "bfloat16": "train.dtype",
    "amp": "train.dtype",
    "torch_autocast": "train.dtype",
    "data_types": "train.dtype",
    "communication_data_type": "train.dtype",
    "seq_parallel_communication_data_type": "train.dtype",
    "steps_per_print": "train.log_every",
    "wandb": "tracker.wandb",
    "tensorboard": "tracker.kind",
    "csv_monitor": "tracker.kind",
    "comet": "tracker.wandb",
    "activation_checkpointing": "train.activation_checkpointing",
    "compile": "train.compile",
    "gradient_allreduce_op": _MEAN,
    "prescale_gradients": _MEAN,
    "gradient_predivide_factor": _MEAN,
    "sparse_gradients": _MEAN,
    "checkpoint": "train.checkpoint_every",
    "datastates_ckpt": "train.checkpoint_every",
    "nebula": "train.checkpoint_every",
    "optimizer": "optim.kind and optim.params",
    "zero_allow_untested_optimizer": "optim.kind",
    "zero_force_ds_cpu_optimizer": "optim.kind",
    "zero_optimization.stage": "train.zero_stage",
    "zero_optimization.elastic_checkpoint": _CHECKPOINTS,
    "zero_optimization.mics_shard_size": _CHECKPOINTS,
    "zero_optimization.mics_hierarchical_params_gather": _CHECKPOINTS,
    "zero_optimization.zero_hpz_partition_size": _CHECKPOINTS,
    "zero_optimization.offload_param": _CHECKPOINTS,
    "zero_optimization.zero_quantized_weights": _MEAN,
    "zero_optimization.zero_quantized_gradients": _MEAN,
    "zero_optimization.compute_grad_norm": _FINITE,
    "zero_optimization.zenflow": _FINITE,
    "zero_optimization.ignore_unused_parameters": _LOOP,
    "zero_optimization.load_from_fp32_weights": _CHECKPOINTS,
    "zero_optimization.offload_optimizer.ratio": _FINITE,
    "zero_optimization.offload_optimizer.super_offload": _FINITE,
    "zero_optimization.offload_optimizer.nvme_path": _CHECKPOINTS,
} | dict.fromkeys(
    (
        "aio",
        "autotuning",
        "compression_training",
        "curriculum_learning",
        "data_efficiency",
        "dataloader_drop_last",
        "eigenvalue",
        "elasticity",
        "expert_parallel",
        "graph_harvesting",
        "hybrid_engine",
        "pipeline",
        "progressive_layer_drop",
        "quantize_training",
        "sequence_parallel_size",
        "sparse_attention",
        "tensor_parallel",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "weight_quantization",
    ),
    _LOOP,
)
"""Refused keys, each with the field or promise of zeta that decides it."""


def check_passthrough(settings: Mapping[str, Any], zero_stage: int | str) -> None:
    """Raise ValueError, naming the key and the field to set instead, unless all settings can pass.

    Args:
        settings: the value of `train.deepspeed`, laid out as DeepSpeed's config.
        zero_stage: `train.zero_stage`, which may be auto.
    """
    for key, value in settings.items():
        _check_key(key, tuple(_ALLOWED))
        inner = _ALLOWED[key]
        if inner is None:
            continue
        if not isinstance(value, Mapping):
            raise ValueError(f"train.deepspeed.{key} is {value!r}; it must be a mapping")
        for name in value:
            _check_key(f"{key}.{name}", tuple(f"{key}.{known}" for known in inner))
    for name, value in settings.get("zero_optimization", {}).items():
        _check_zero_value(name, value)
    _check_offload(settings, zero_stage)


def offloads_optimizer(settings: Mapping[str, Any]) -> bool:
    """Return whether the optimizer's state and the gradients are kept in host memory."""
    offload = settings.get("zero_optimization", {}).get("offload_optimizer")
    return isinstance(offload, Mapping) and offload.get("device") == "cpu"


def merged(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return zeta's DeepSpeed config with the user's settings, which must have been checked."""
    zero = {**config["zero_optimization"], **settings.get("zero_optimization", {})}
    result = deepcopy({**config, **settings, "zero_optimization": zero})
    if offloads_optimizer(settings):
        result["zero_force_ds_cpu_optimizer"] = False  # torch's own needs no compiler
    return result


def _check_key(key: str, known: tuple[str, ...]) -> None:
    if key in known:
        return
    if key in _DECIDED:
        raise ValueError(f"train.deepspeed.{key} is decided by {_DECIDED[key]}: leave it out")
    near = difflib.get_close_matches(key, [*known, *_DECIDED], n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
    raise ValueError(f"train.deepspeed.{key} is not a setting that zeta passes on; {hint}")


def _check_zero_value(name: str, value: Any) -> None:
    key = f"train.deepspeed.zero_optimization.{name}"
    if name in _SIZES:
        check_range(key, value, int(name == "reduce_bucket_size"), open_high=True)
        if value != int(value):
            raise ValueError(f"{key} is {value:g}; it must be a whole number")
    elif name != "offload_optimizer" and value not in (True, False):
        raise ValueError(f"{key} is {value!r}; it must be true or false")


def _check_offload(settings: Mapping[str, Any], zero_stage: int | str) -> None:
    offload = settings.get("zero_optimization", {}).get("offload_optimizer")
    if offload is None:
        return
    where = "zero_optimization.offload_optimizer"
    if not isinstance(offload, Mapping) or offload.get("device") not in ("cpu", "none"):
        raise ValueError(
            f"train.deepspeed.{where} is {offload!r}; it must be a mapping with device cpu or none"
        )
    for name in offload:
        known = ("device", "pin_memory", "buffer_count", "pipeline_read", "pipeline_write")
        _check_key(f"{where}.{name}", tuple(f"{where}.{item}" for item in (*known, "fast_init")))
    if offload["device"] == "cpu" and zero_stage == 0:
        raise ValueError(f"train.deepspeed.{where} needs train.zero_stage of 1, 2 or 3; it is 0")
