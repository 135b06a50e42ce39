"""Time an all-reduce over the nodes of a job, one process a node, and name those that miss it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from zeta.distributed import RankInfo, Store, as_timeout, export_environment

_MIB = 2**20
_MIBS = {"cuda": 256, "cpu": 16}
_ROUNDS = 5
TIMEOUT_S = 120.0
_MARGIN_S = 5.0
_POLL_S = 0.05
_ANSWER = "answer/{}"


@dataclass(frozen=True)
class AllReduce:
    """Time that an all-reduce took in the median round."""

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


class AllReduceError(RuntimeError):
    """The all-reduce failed; raised on the first process, with the answers of all."""

    def __init__(self, answers: Sequence[str | None]) -> None:
        super().__init__("the all-reduce failed")
        self.answers = answers
        """For each process, what went wrong there; empty: nothing did; None: it did not answer."""


def answered_all_reduce(
    info: RankInfo, store: Store, device: torch.device, timeout_s: float = TIMEOUT_S
) -> AllReduce:
    """Do `timed_all_reduce` and, where it fails, find out who is missing; every process calls it.

    Raises:
        AllReduceError: it failed; on the first process, once all have had the time to answer.
        RuntimeError: it failed; on the others.
    """
    began, fault = time.monotonic(), ""
    try:
        return timed_all_reduce(info, PrefixStore("group", store), device, timeout_s)
    except RuntimeError as error:
        fault = str(error).partition("\n")[0]
        if info.rank != 0:
            raise
        # Who waits for a process that is gone gives up after the time limit, or with us.
        deadline = max(began + timeout_s, time.monotonic()) + _MARGIN_S
        raise AllReduceError([fault, *_hear(store, info, deadline)]) from error
    finally:
        with contextlib.suppress(RuntimeError):  # if all is well the first one may be gone by now
            store.set(_ANSWER.format(info.rank), fault)


def _hear(store: Store, info: RankInfo, deadline: float) -> Iterator[str | None]:
    """Yield the answer of each other process; None where it does not come in time."""
    for rank in range(1, info.world_size):
        key = _ANSWER.format(rank)
        while not store.check([key]) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        yield store.get(key).decode() if store.check([key]) else None


def timed_all_reduce(
    info: RankInfo, store: Store, device: torch.device, timeout_s: float = TIMEOUT_S
) -> AllReduce:
    """Reduce over all processes a few times, and check the sums; every process calls it.

    Args:
        info: one process a node.
        store: where they meet.
        device: cuda: NCCL, on one GPU of each node; else gloo.
        timeout_s: seconds that a process waits for the others.

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
        timeout=as_timeout(timeout_s),
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
