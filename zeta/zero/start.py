"""The start of a rank: the process group, and DeepSpeed on it."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from zeta.distributed import (
    COLLECTIVE_TIMEOUT_S,
    RankInfo,
    Store,
    World,
    as_timeout,
    choose_device,
    export_environment,
    meeting_place,
    rank_from_environment,
)
from zeta.run.cpu_tuning import gather_in_place, keep_freed_memory
from zeta.zero.requirements import check_library


def init_distributed(
    info: RankInfo | None = None,
    timeout_s: float = COLLECTIVE_TIMEOUT_S,
    device_kind: str = "auto",
    store: Store | None = None,
) -> World:
    """Join the process group (NCCL on CUDA devices, else gloo) and set DeepSpeed up on it.

    This needs no compiler: DeepSpeed would build a shared-memory op for CPU collectives, which
    takes up to 100 s and crashes without a compiler or ninja, so the op is declared unavailable.

    Args:
        info: this process's rank; None reads it from the environment.
        timeout_s: seconds after which a collective that some rank never joined fails;
            `set_collective_timeout` changes it.
        device_kind: cuda, cpu, or auto: CUDA if this process sees a device.
        store: where the ranks meet, if they have met already; see `meeting_place`.

    Returns:
        The world; `close_distributed` ends it.

    Raises:
        ValueError: no CUDA device although one is requested, or fewer devices than ranks on this
            machine.
        RunError: another version of DeepSpeed is installed, which lacks what zeta relies on.
    """
    info = info or rank_from_environment(os.environ)
    device = choose_device(info, device_kind, torch.cuda.device_count())
    use_cuda = device.type == "cuda"
    export_environment(info, use_cuda)

    # Imported only now: DeepSpeed chooses its accelerator from the environment when imported.
    import deepspeed
    from deepspeed.comm import comm

    check_library()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if use_cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    timeout = as_timeout(timeout_s)
    if not dist.is_initialized():
        backend = "nccl" if use_cuda else "gloo"
        store = store or meeting_place(info, timeout_s)
        size, rank = info.world_size, info.rank
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    deepspeed.init_distributed(verbose=False)
    if not use_cuda:
        comm.cdb.all_gather_function = gather_in_place  # of the weights, at ZeRO 1 and 2
    return World(info, device)


def close_distributed() -> None:
    """Leave the process group, and let DeepSpeed forget the groups that it made in it."""
    if dist.is_initialized():
        from deepspeed import comm

        comm.destroy_process_group()
