"""Choose how many processes of a rank decode images, where `data.workers` is auto."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import joblib
import torch

from launch.config.load import ZetaConfig
from zeta.config_field import AUTO
from zeta.distributed import rank_from_environment

_CPU_TRAINS_PER_WORKER = 8
"""Cores of a rank that trains on a CPU for each worker: training is what is slow there."""


def loader_workers(
    config: ZetaConfig, environment: Mapping[str, str], *, on_gpu: bool | None = None
) -> int:
    """Return the number of decoding processes of this rank.

    A rank that trains on a GPU gives all its cores but one to them, and one on a CPU an eighth.

    Args:
        config: `data.workers`, and `train.device`.
        environment: variables of the process, which say how many ranks share this machine.
        on_gpu: whether the rank trains on a GPU; None: as it would here.
    """
    if config.data.workers != AUTO:
        return int(config.data.workers)
    cores = rank_cores(environment)
    if on_gpu is None:
        on_gpu = config.train.device != "cpu" and torch.cuda.is_available()
    return max(1, cores - 1 if on_gpu else cores // _CPU_TRAINS_PER_WORKER)


def rank_cores(environment: Mapping[str, str]) -> int:
    """Return the cores that this rank may use, at least 1.

    These are the cores of its affinity, within the CPU quota of its container, shared with the
    other ranks of the machine. Where Slurm gives each task cores of its own, nothing is shared.
    """
    cores, info = int(joblib.cpu_count()), rank_from_environment(environment)
    if own := environment.get("SLURM_CPUS_PER_TASK"):
        cores = min(cores, int(own))
        if info.from_slurm:  # else the task has started ranks of its own, which share its cores
            return max(1, cores)
    return max(1, cores // info.local_world_size)


def with_workers(config: ZetaConfig, workers: int) -> ZetaConfig:
    """Return the config with a number of decoding processes."""
    return replace(config, data=replace(config.data, workers=workers))
