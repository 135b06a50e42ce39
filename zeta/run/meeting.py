"""How the ranks of a job meet: in slices of time, so that signals are answered meanwhile.

torch's store waits in C++, where Python handles no signal: a rank that waits for one that never
comes could only be killed.
"""

from __future__ import annotations

import os
import socket
import sys
import time

from zeta.distributed import COLLECTIVE_TIMEOUT_S, RankInfo, Store, meeting_place
from zeta.run.signals import asked_to_stop

_ARRIVED = "zeta/arrived"
_SAY_S = 1.0
"""Seconds of waiting after which it is said for whom."""
_SAY_FOLLOWER_S = 5.0
_TELL_S = 20.0
"""Seconds that a rank which is asked to stop goes on looking for rank 0: one that leaves without a
word would be waited for. Less than the 30 s after which Slurm kills."""
_UNKNOWN_HOST_S = 30.0
"""Seconds that the name of the first host may be unknown: name servers take a while."""
_SLICE_S = 0.1


class LeavingError(Exception):
    """This rank was asked to stop while it waited for others; it ends with `status`."""

    def __init__(self, status: int) -> None:
        super().__init__(f"asked to stop while the ranks met (exit status {status})")
        self.status = status


def meet(info: RankInfo, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> Store:
    """Return the store of this job, see `zeta.distributed.meeting_place`, once it can be reached.

    Raises:
        LeavingError: a signal asked to stop meanwhile; Ctrl-C raises KeyboardInterrupt.
        ConnectionError: rank 0 was not there in time, or its host is not known.
    """
    if info.world_size > 1:
        _reach(info, timeout_s)
    store = meeting_place(info, timeout_s)
    store.add(_ARRIVED, 1)
    return store


def wait_for_ranks(store: Store, info: RankInfo, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> None:
    """Wait until all ranks have met.

    Raises:
        LeavingError, KeyboardInterrupt: as `meet`.
        TimeoutError: some did not come.
        RuntimeError: the store is gone, and rank 0 with it.
    """
    while _missing(store, info) and not wait_for(store, "", info, timeout_s):
        pass


def wait_for(store: Store, key: str, info: RankInfo, timeout_s: float) -> bool:
    """Wait until a key of the store is set ("": until all ranks have met), and return True.

    After a second, rank 0 says on stderr which ranks it waits for, if not all have come.

    Raises:
        LeavingError, KeyboardInterrupt: as `meet`.
        TimeoutError: it was not set in time.
        RuntimeError: the store is gone, and rank 0 with it.
    """
    began, said = time.monotonic(), info.rank != 0
    while not (store.check([key]) if key else _missing(store, info) == 0):
        _leave_if_asked()
        waited = time.monotonic() - began
        if waited > timeout_s:
            missing = _missing(store, info)
            raise TimeoutError(
                f"{missing} of {info.world_size} ranks did not come to {_place(info)} in "
                f"{timeout_s:g} s"
                if missing
                else f"no answer from another rank in {timeout_s:g} s"
            )
        if not said and waited > _SAY_S:
            said = True
            if missing := _missing(store, info):
                _say(f"waiting for {missing} of {info.world_size} ranks at {_place(info)}", info)
        time.sleep(_SLICE_S if waited > 1 else 0.01)
    return True


def _missing(store: Store, info: RankInfo) -> int:
    return max(0, info.world_size - store.add(_ARRIVED, 0))


def _reach(info: RankInfo, timeout_s: float) -> None:
    """Wait until rank 0 listens, or on rank 0 until its own name is known."""
    began, said, asked_at = time.monotonic(), False, float("inf")
    while (error := _obstacle(info)) is not None:
        waited = time.monotonic() - began
        if asked_to_stop() is not None:
            asked_at = min(asked_at, waited)
        if waited - asked_at >= (0 if info.rank == 0 else _TELL_S):
            _leave_if_asked()
        limit = min(timeout_s, _UNKNOWN_HOST_S) if isinstance(error, socket.gaierror) else timeout_s
        if waited > limit:
            raise ConnectionError(
                f"rank {info.rank} cannot meet the other ranks at {info.master_addr}, port "
                f"{info.master_port}: {error}; set MASTER_ADDR to the address of rank 0's machine"
            )
        if not said and waited > (_SAY_S if info.rank == 0 else _SAY_FOLLOWER_S):
            said = True
            _say(f"rank {info.rank} waits for rank 0 at {_place(info)} ({error})", info)
        time.sleep(_SLICE_S)


def _obstacle(info: RankInfo) -> OSError | None:
    try:
        serves = info.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if serves:
            socket.getaddrinfo(info.master_addr, info.master_port)
        else:
            socket.create_connection((info.master_addr, info.master_port), timeout=1.0).close()
    except OSError as error:
        return error
    return None


def _leave_if_asked() -> None:
    if (status := asked_to_stop()) is not None:
        raise LeavingError(status)


def _place(info: RankInfo) -> str:
    place = f"{info.master_addr}:{info.master_port}"
    if not info.from_slurm:
        return place
    step = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_STEP_ID', '?')}"
    return f"{place} (job step {step})"


def _say(text: str, info: RankInfo) -> None:
    alone = (
        "; in a shell of srun, `env -u SLURM_STEP_NUM_TASKS zeta ...` runs in this process alone, "
        "and `zeta launch local` starts ranks of its own"
        if info.from_slurm
        else ""
    )
    print(f"zeta: {text}; Ctrl-C ends this{alone}", file=sys.stderr, flush=True)
