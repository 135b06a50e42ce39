"""A timed all-reduce over the nodes of a job, one process a node."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from zeta.distributed import RankInfo, Store, as_timeout, export_environment

_MIB = 2**20
_MIBS = {"cuda": 256, "cpu": 16}
_ROUNDS = 5
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class AllReduce:
    """What an all-reduce took, on the slowest of so many rounds."""

    nodes: int
    mib: int
    seconds: float

    def __str__(self) -> str:
        # What crosses each link of a ring: comparable with its rated bandwidth for any node count.
        gb = 2 * (self.nodes - 1) / self.nodes * self.mib * _MIB / 1e9
        return (
            f"all-reduce of {self.mib} MiB over {self.nodes} nodes: {1000 * self.seconds:.1f} ms, "
            f"{gb / self.seconds:.2f} GB/s a link"
        )


def timed_all_reduce(info: RankInfo, store: Store, device: torch.device) -> AllReduce:
    """Reduce over all processes a few times, and check the sums; every process calls it.

    Args:
        info: one process a node.
        store: where they meet.
        device: cuda: NCCL, on one GPU of each node; else gloo.

    Returns:
        The median round.

    Raises:
        RuntimeError: the nodes cannot reach each other, or a sum is wrong.
    """
    export_environment(info, device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=info.rank,
        world_size=info.world_size,
        timeout=as_timeout(_TIMEOUT_S),
    )
    try:
        mib = _MIBS[device.type]
        values = torch.empty(mib * _MIB // 4, device=device)
        rounds = sorted(_round(values, info) for _ in range(_ROUNDS + 1))
        return AllReduce(info.world_size, mib, rounds[_ROUNDS // 2])
    finally:
        dist.destroy_process_group()


def _round(values: torch.Tensor, info: RankInfo) -> float:
    """Return the seconds of one all-reduce of 1 + 2 + ... over the processes."""
    values.fill_(info.rank + 1)
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(values)
    low, high = values.min().item(), values.max().item()  # waits for the device
    seconds = time.perf_counter() - began
    expected = info.world_size * (info.world_size + 1) / 2
    if low != expected or high != expected:
        raise RuntimeError(f"the sum over the nodes is {low:g} to {high:g}, not {expected:g}")
    return seconds
