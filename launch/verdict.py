"""Rank 0's verdict on a start: the other ranks wait for it, so that a refusal is said once.

It goes through the store at which the ranks meet, before a process group exists: no DeepSpeed, no
device, no collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from launch.errors import exit_code
from zeta.distributed import RankInfo, Store, as_timeout

_VERDICT = "zeta/start/verdict"
_HEARD = "zeta/start/heard"
_GO = "go"
_SECONDS_TO_HEAR = 3.0
"""How long rank 0 keeps the store open after a refusal, for ranks that are not there yet."""

Checked = TypeVar("Checked")


class RefusedError(Exception):
    """Rank 0 does not start, and has said why; this rank ends with the same status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"rank 0 does not start (exit status {status})")
        self.status = status


def check_together(
    check: Callable[[], Checked], store: Store, info: RankInfo, timeout_s: float
) -> Checked:
    """Run `check` on rank 0, and on the others once it has passed there.

    Returns:
        What `check` returned here.

    Raises:
        RefusedError: on the other ranks, where rank 0 failed.
        ConnectionError: rank 0 is gone without a verdict, or gave none for `timeout_s`.
    """
    if info.rank == 0:
        try:
            checked = check()
        except BaseException as error:  # an interrupt as well: nobody may wait for us
            _refuse(store, info, exit_code(error, in_training=True))
            raise
        store.set(_VERDICT, _GO)
        return checked
    try:
        store.wait([_VERDICT], as_timeout(timeout_s))
        verdict = store.get(_VERDICT).decode()
        if verdict != _GO:
            store.add(_HEARD, 1)
    except RuntimeError as error:
        raise ConnectionError(f"rank 0 gave no word about the start: {error}") from error
    if verdict != _GO:
        raise RefusedError(int(verdict))
    return check()


def _refuse(store: Store, info: RankInfo, status: int) -> None:
    """Tell the others, and let those that are here hear it: the store goes with this process."""
    store.set(_VERDICT, str(status))
    deadline = time.monotonic() + _SECONDS_TO_HEAR
    while store.add(_HEARD, 0) < info.world_size - 1 and time.monotonic() < deadline:
        time.sleep(0.02)
