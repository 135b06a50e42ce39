"""Let the ranks agree on a start: either all of them train, or none does and one reports why.

They agree through the store at which they meet, before a process group exists, without DeepSpeed, a
device or a collective. Rank 0 checks first and reports the faults that every rank would find; then
the other ranks check their own view of the files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

from launch.errors import exit_code
from zeta.distributed import RankInfo, Store, rank_from_environment
from zeta.run.meeting import LeavingError, meet, wait_for

_FIRST_ANSWER = "zeta/start/first_answer"
_HEARD = "zeta/start/heard"
_PASSED = "zeta/start/passed"
_FAILED = "zeta/start/failed"
_ALL_ANSWER = "zeta/start/all_answer"
_GO = "go"
_SECONDS_TO_REFUSE = 30.0
"""Time that a rank with a wrong config waits for rank 0, which may still be loading its config."""
_SECONDS_TO_HEAR = 3.0
"""Time that rank 0 keeps the store open after a refusal, for ranks that have not connected yet."""

Checked = TypeVar("Checked")


class RefusedError(Exception):
    """Another rank refused to start and reported why; this rank ends with the same status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"another rank refused to start (exit status {status})")
        self.status = status


def check_together(
    check: Callable[[], Checked], store: Store, info: RankInfo, timeout_s: float
) -> Checked:
    """Run `check` on rank 0, and on the others once it has passed there.

    Returns:
        The result of `check` on this rank, once it has passed on every rank.

    Raises:
        RefusedError: another rank failed, and reported why.
        ConnectionError: a rank ended without an answer, or did not answer within `timeout_s`
            seconds.
    """
    if info.rank == 0:
        checked = _first_check(check, store, info)
    else:
        _hear(_FIRST_ANSWER, store, info, timeout_s)
        checked = _further_check(check, store)
    if store.add(_PASSED, 1) == info.world_size:
        store.compare_set(_ALL_ANSWER, "", _GO)  # unless a rank has left meanwhile
    try:
        _hear(_ALL_ANSWER, store, info, timeout_s)
    except (RefusedError, LeavingError, KeyboardInterrupt):
        if info.rank == 0:
            _linger(store, info)
        raise
    return checked


def refuse_together(error: ValueError) -> int:
    """Refuse to start for an error found before the ranks meet, such as a wrong config value.

    Returns:
        The exit status, if rank 0 refuses as well and reports the error.

    Raises:
        ValueError: `error` itself, if this rank has to report it.
    """
    info = rank_from_environment(os.environ)
    if info.world_size == 1:
        raise error

    def check() -> int:
        raise error

    try:
        store = meet(info, _SECONDS_TO_REFUSE)
        return check_together(check, store, info, _SECONDS_TO_REFUSE)
    except (RefusedError, LeavingError) as refused:
        return refused.status
    except ConnectionError:  # nobody to agree with: rank 0 is gone, or its port is taken
        raise error from None


def _first_check(check: Callable[[], Checked], store: Store, info: RankInfo) -> Checked:
    """Check on rank 0, and send the answer to the other ranks."""
    try:
        checked = check()
    except BaseException as error:  # an interrupt too: no other rank may wait for this one
        store.set(_FIRST_ANSWER, str(exit_code(error, in_training=True)))
        _linger(store, info)
        raise
    store.set(_FIRST_ANSWER, _GO)
    return checked


def _further_check(check: Callable[[], Checked], store: Store) -> Checked:
    """Check on another rank; if several fail, such as all of one node, the first one reports."""
    try:
        return check()
    except BaseException as error:
        status = exit_code(error, in_training=True)
        store.add(_HEARD, 1)
        if store.add(_FAILED, 1) > 1:
            raise RefusedError(status) from error
        store.set(_ALL_ANSWER, str(status))
        raise


def _linger(store: Store, info: RankInfo) -> None:
    """Wait until the connected ranks have read a refusal, because the store ends with rank 0."""
    deadline = time.monotonic() + _SECONDS_TO_HEAR
    while store.add(_HEARD, 0) < info.world_size - 1 and time.monotonic() < deadline:
        time.sleep(0.02)


def _hear(key: str, store: Store, info: RankInfo, timeout_s: float) -> None:
    """Wait for an answer; raise RefusedError if it is a refusal."""
    try:
        wait_for(store, key, info, timeout_s)
        answer = store.get(key).decode()
        if answer != _GO and info.rank != 0:
            store.add(_HEARD, 1)
    except (LeavingError, KeyboardInterrupt) as leaving:
        status = getattr(leaving, "status", exit_code(leaving, in_training=True))
        store.compare_set(_ALL_ANSWER, "", str(int(status)))  # no other rank may wait for this one
        if info.rank != 0:
            store.add(_HEARD, 1)
        raise
    except (RuntimeError, TimeoutError) as error:
        raise ConnectionError(
            f"another rank did not report whether it can start: {error}"
        ) from error
    if answer != _GO:
        raise RefusedError(int(answer))
