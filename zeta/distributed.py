"""The rank of this process, the process group, and collectives on small host values.

A rank comes from the variables of torchrun, from those of a Slurm step, or from nothing (a single
process, which uses DeepSpeed all the same).
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, TCPStore
from torch.distributed import Store as Store

from zeta.exit_codes import RunError

COLLECTIVE_TIMEOUT_S = 30 * 60.0
LAUNCHED_RANKS = "ZETA_LAUNCHED_RANKS"
"""Variable by which the ranks that `zeta launch local` starts know that they are its own."""
_LONGEST_TIMEOUT_S = 7 * 24 * 3600.0
# Public since torch 2.14. The older function sets the same limit, of gloo and NCCL.
_set_timeout: Callable[[timedelta, dist.ProcessGroup], None] = getattr(
    dist, "set_timeout", dist.distributed_c10d._set_pg_timeout
)


@dataclass(frozen=True)
class RankInfo:
    """Place of this process in the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank among those on this machine."""
    local_world_size: int = 1
    """Ranks on this machine."""
    master_addr: str = "127.0.0.1"
    """Host of rank 0, where the ranks meet."""
    master_port: int = 0
    """Port where the ranks meet; a single process does not use it."""
    from_slurm: bool = False
    """Whether srun started this process, rather than torchrun, `zeta launch local` or nothing."""


def rank_from_environment(environment: Mapping[str, str]) -> RankInfo:
    """Read the rank from torchrun's variables, else from a Slurm step's, else a single process.

    A batch script also sees SLURM_PROCID; only the SLURM_STEP_* variables show that `srun` started
    this process. Variables with fewer ranks than the step has tasks were left in the shell that
    submitted the job: the step decides, unless a launcher has just started this process, as in a
    shell of `srun --pty`.

    Raises:
        ValueError: some variables of a launcher are set and others missing.
    """
    in_slurm = "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment
    if "RANK" in environment or "WORLD_SIZE" in environment:
        torchrun = _from_torchrun(environment)
        tasks = int(environment["SLURM_STEP_NUM_TASKS"]) if in_slurm else 1
        own = environment.get(LAUNCHED_RANKS) == environment["WORLD_SIZE"]
        if own or "TORCHELASTIC_RUN_ID" in environment or torchrun.world_size >= tasks:
            return torchrun
        environment = {k: v for k, v in environment.items() if not k.startswith("MASTER_")}
    return _from_slurm(environment) if in_slurm else RankInfo()


def _from_torchrun(environment: Mapping[str, str]) -> RankInfo:
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in environment]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} not set, though RANK or WORLD_SIZE is; start the ranks with "
            "`zeta launch local`, torchrun or srun, or unset both for a single process"
        )
    world_size = int(environment["WORLD_SIZE"])
    return RankInfo(
        rank=int(environment["RANK"]),
        world_size=world_size,
        local_rank=int(environment["LOCAL_RANK"]),
        local_world_size=int(environment.get("LOCAL_WORLD_SIZE", world_size)),
        master_addr=environment["MASTER_ADDR"],
        master_port=int(environment["MASTER_PORT"]),
    )


def _from_slurm(environment: Mapping[str, str]) -> RankInfo:
    tasks_per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
    node = int(environment.get("SLURM_NODEID", "0"))
    job = int(environment.get("SLURM_JOB_ID", "0"))
    restarts = int(environment.get("SLURM_RESTART_COUNT", "0"))
    address = environment.get("MASTER_ADDR") or _first_host(
        environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    )
    return RankInfo(
        rank=int(environment["SLURM_PROCID"]),
        world_size=int(environment["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(environment.get("SLURM_LOCALID", "0")),
        local_world_size=_expand_counts(tasks_per_node)[node],
        master_addr=address,
        # Below the ephemeral ports; another port for every job that shares the node, and after
        # every restart, when the port of the attempt before may still be taken.
        master_port=int(environment.get("MASTER_PORT", 20000 + (job + 3331 * restarts) % 10000)),
        from_slurm=True,
    )


def _expand_counts(text: str) -> list[int]:
    """Expand Slurm's run lengths: "2(x3),1" is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, repeats = part.partition("(x")
        counts += [int(count)] * int(repeats.rstrip(")") or 1)
    return counts


def _first_host(nodelist: str) -> str:
    """Return the first node of Slurm's list: `a[01-03,7]-ib,b` begins with a01-ib."""
    first = ""
    while nodelist and nodelist[0] != ",":
        plain, bracket, rest = nodelist.partition("[")
        if not bracket or "," in plain:
            return first + plain.partition(",")[0]
        inside, _, nodelist = rest.partition("]")
        first += plain + re.split("[,-]", inside, maxsplit=1)[0]
    return first


class World:
    """The ranks of this run, and collectives on a few host values (never on gradients)."""

    def __init__(self, info: RankInfo, device: torch.device) -> None:
        self.info = info
        self.rank = info.rank
        self.size = info.world_size
        self.device = device
        # Host values go over gloo: they must not wait for kernels queued on the device.
        self._host_group: dist.ProcessGroup | None = None
        if device.type == "cuda" and self.size > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._host_group = group

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes shared files and the terminal."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sum of `values` over all ranks, in float64."""
        if self.size == 1:  # needs no process group, so that `zeta eval` starts without one
            return [float(value) for value in values]
        vector = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(vector, group=self._host_group)
        result: list[float] = vector.tolist()
        return result

    def all(self, flag: bool) -> bool:
        """Whether `flag` is true on every rank."""
        return self.sum([not flag])[0] == 0

    def gather(self, value: Any) -> list[Any]:
        """Return `value` of every rank, by rank; for small Python objects of our own."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` on every rank."""
        if self.size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, group=self._host_group)
        return holder[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum([0.0])

    def raise_together(self, failure: Exception | None) -> NoReturn:
        """Raise the failure of some rank on every rank; `failure` is this rank's, if any.

        NOTE: every rank raises, else the others would wait for the failed one in a collective.

        Raises:
            RunError: some rank failed with one.
            RuntimeError: some other rank failed with anything else.
        """
        failures: list[tuple[str, bool] | None] = self.gather(
            None if failure is None else (str(failure), isinstance(failure, RunError))
        )
        if failure is not None:
            raise failure
        found = {rank: item for rank, item in enumerate(failures) if item is not None}
        text = "; ".join(f"rank {rank}: {message}" for rank, (message, _) in found.items())
        raise RunError(text) if any(fatal for _, fatal in found.values()) else RuntimeError(text)


def meeting_place(info: RankInfo, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> Store:
    """Return the store of this job: rank 0 serves it at once, the others wait until it does.

    A single process needs no port, so any number of them fit on one machine. Under torchrun the
    store is that of its agent, and every restart has keys of its own.

    Raises:
        ConnectionError: the port is taken, or rank 0 was not there in time; a restart may help.
    """
    if info.world_size == 1:
        return HashStore()
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            info.master_addr,
            info.master_port,
            info.world_size,
            is_master=info.rank == 0 and not agent,
            timeout=as_timeout(timeout_s),
            wait_for_workers=False,
        )
    except dist.DistError as error:
        raise ConnectionError(
            f"rank {info.rank} cannot meet the other ranks at {info.master_addr}, port "
            f"{info.master_port}: {str(error).splitlines()[0]}"
        ) from error
    return PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def set_collective_timeout(seconds: float) -> None:
    """Let collectives that begin from now on fail once they have waited for `seconds`.

    It applies to every group of this process. gloo raises in the waiting rank; NCCL ends the
    process, since work queued behind a failed collective would compute on garbage. MPI and other
    back-ends keep their own limit. Infinity becomes a week: back-ends need a finite limit.
    """
    if not dist.is_initialized():
        return
    timeout = as_timeout(seconds)
    for group in list(dist.distributed_c10d._world.pg_map):
        _set_timeout(timeout, group)


def as_timeout(seconds: float) -> timedelta:
    """Return a time limit for torch, a week at most: it has no infinite one."""
    return timedelta(seconds=min(seconds, _LONGEST_TIMEOUT_S))


def choose_device(info: RankInfo, kind: str, visible: int) -> torch.device:
    """Return the device of a rank.

    Args:
        info: the rank.
        kind: cuda, cpu or auto.
        visible: number of CUDA devices that this process sees.

    Raises:
        ValueError: no CUDA device where one is asked for, or fewer devices than ranks on this
            machine.
    """
    if kind == "cpu" or (kind == "auto" and visible == 0):
        return torch.device("cpu")
    if visible == 0:
        raise ValueError("train.device is cuda, but no CUDA device is visible; set it to cpu")
    # In a Slurm step each task may see its own device alone, as number 0.
    own_device = info.from_slurm and visible == 1
    if visible < info.local_world_size and not own_device:
        raise ValueError(
            f"{info.local_world_size} ranks on this machine but only {visible} CUDA devices: "
            "start one rank a device, or set train.device=cpu"
        )
    return torch.device("cuda", info.local_rank % visible)


def compiler_available() -> bool:
    """Whether torch.compile can build its kernels here."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))


def export_environment(info: RankInfo, use_cuda: bool) -> None:
    """Set the variables that torch and DeepSpeed read the rank from, whoever started us."""
    os.environ["RANK"] = str(info.rank)
    os.environ["WORLD_SIZE"] = str(info.world_size)
    os.environ["LOCAL_RANK"] = str(info.local_rank)
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["LOCAL_SIZE"] = str(info.local_world_size)
    os.environ["MASTER_ADDR"] = info.master_addr
    os.environ["MASTER_PORT"] = str(info.master_port)
    if not use_cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    on_loopback = info.master_addr in ("127.0.0.1", "localhost", "::1")
    if on_loopback and sys.platform == "linux":
        # Else gloo looks up the host's name, which need not resolve on a laptop or container.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
