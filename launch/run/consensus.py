"""The ranks' common verdict on a start: all of them train, or none does and it is said once.

It goes through the store at which the ranks meet, before a process group exists: no DeepSpeed, no
device, no collective. Rank 0 checks first, so that what every rank would find is said by rank 0;
then the others check what they see.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

from launch.errors import exit_code
from zeta.distributed import (
    RankInfo,
    Store,
    as_timeout,
    meeting_place,
    rank_from_environment,
)

_VERDICT = "zeta/start/verdict"
_HEARD = "zeta/start/heard"
_PASSED = "zeta/start/passed"
_FAILED = "zeta/start/failed"
_COMMON_VERDICT = "zeta/start/common_verdict"
_GO = "go"
_SECONDS_TO_REFUSE = 30.0
"""How long a rank with a wrong config waits for word from rank 0, which may be loading its own."""
_SECONDS_TO_HEAR = 3.0
"""How long rank 0 keeps the store open after a refusal, for ranks that are not there yet."""

Checked = TypeVar("Checked")


class RefusedError(Exception):
    """Another rank does not start, and has said why; this rank ends with the same status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"another rank does not start (exit status {status})")
        self.status = status


def check_together(
    check: Callable[[], Checked], store: Store, info: RankInfo, timeout_s: float
) -> Checked:
    """Run `check` on rank 0, and on the others once it has passed there.

    Returns:
        What `check` returned here, once it has passed on every rank.

    Raises:
        RefusedError: another rank failed, which says why.
        ConnectionError: a rank is gone without a verdict, or gave none for `timeout_s`.
    """
    if info.rank == 0:
        checked = _first_check(check, store, info)
    else:
        _hear(_VERDICT, store, info, timeout_s)
        checked = _further_check(check, store)
    if store.add(_PASSED, 1) == info.world_size:
        store.set(_COMMON_VERDICT, _GO)
    try:
        _hear(_COMMON_VERDICT, store, info, timeout_s)
    except RefusedError:
        if info.rank == 0:
            _linger(store, info)
        raise
    return checked


def refuse_together(error: ValueError) -> int:
    """Refuse what this rank cannot even meet the others with, such as a config with a wrong value.

    Returns:
        What to exit with, where rank 0 refuses as well, and says it.

    Raises:
        ValueError: `error`; this rank is to say it.
    """
    info = rank_from_environment(os.environ)
    if info.world_size == 1:
        raise error

    def check() -> int:
        raise error

    try:
        store = meeting_place(info, _SECONDS_TO_REFUSE)
        return check_together(check, store, info, _SECONDS_TO_REFUSE)
    except RefusedError as refused:
        return refused.status
    except ConnectionError:  # nobody to agree with: rank 0 is gone, or its port is taken
        raise error from None


def _first_check(check: Callable[[], Checked], store: Store, info: RankInfo) -> Checked:
    """Check on rank 0, and tell the others."""
    try:
        checked = check()
    except BaseException as error:  # an interrupt as well: nobody may wait for us
        store.set(_VERDICT, str(exit_code(error, in_training=True)))
        _linger(store, info)
        raise
    store.set(_VERDICT, _GO)
    return checked


def _further_check(check: Callable[[], Checked], store: Store) -> Checked:
    """Check on another rank; of several that fail, such as those of one node, the first says it."""
    try:
        return check()
    except BaseException as error:
        status = exit_code(error, in_training=True)
        store.add(_HEARD, 1)
        if store.add(_FAILED, 1) > 1:
            raise RefusedError(status) from error
        store.set(_COMMON_VERDICT, str(status))
        raise


def _linger(store: Store, info: RankInfo) -> None:
    """Let those that are here hear a refusal: the store goes with the process of rank 0."""
    deadline = time.monotonic() + _SECONDS_TO_HEAR
    while store.add(_HEARD, 0) < info.world_size - 1 and time.monotonic() < deadline:
        time.sleep(0.02)


def _hear(key: str, store: Store, info: RankInfo, timeout_s: float) -> None:
    """Wait for a verdict; raise RefusedError unless it is to go on."""
    try:
        store.wait([key], as_timeout(timeout_s))
        verdict = store.get(key).decode()
        if verdict != _GO and info.rank != 0:
            store.add(_HEARD, 1)
    except RuntimeError as error:
        raise ConnectionError(f"another rank gave no word about the start: {error}") from error
    if verdict != _GO:
        raise RefusedError(int(verdict))
