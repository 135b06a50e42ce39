"""Signals that ask a run to save and end, kept as a flag that is read between steps."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from zeta.exit_codes import ExitCode

_REQUEUE = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
ONE_PRESS_SECONDS = 0.2
"""Seconds within which a second SIGINT is the same Ctrl-C: the terminal sends it to the whole
process group, and `timeout`, `uv run` and others forward it again."""


class StopSignals:
    """While entered: USR1, USR2 and TERM ask to save and requeue, INT to save and end.

    A second INT ends the process at once. The handlers only record the signal. An instance that is
    entered inside another one takes over the signal which that one has recorded.

    Args:
        also: called whenever `requested` is read, as another source of requests; once it has
            returned an exit code it must not return None again.
        interrupts: whether to handle INT too; if not, its handler is left as it is.
    """

    def __init__(
        self, also: Callable[[], ExitCode | None] = lambda: None, *, interrupts: bool = True
    ) -> None:
        self._also = also
        self._numbers = (*_REQUEUE, signal.SIGINT) if interrupts else _REQUEUE
        self._noted: ExitCode | None = None
        self._interrupted_at = float("-inf")
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    @property
    def requested(self) -> ExitCode | None:
        """The requested exit code; None if there is no request."""
        return self._noted if self._noted is ExitCode.INTERRUPTED else self._also() or self._noted

    def __enter__(self) -> StopSignals:
        for number in self._numbers:
            previous = self._previous[number] = signal.signal(number, self._note)
            outer = getattr(previous, "__self__", None)
            if isinstance(outer, StopSignals):
                self._noted = self._noted or outer._noted
        owner = os.getpid()
        os.register_at_fork(after_in_child=lambda: _reset_in_child(owner))
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            self._noted = self._noted or ExitCode.REQUEUE
            return
        before, self._interrupted_at = self._interrupted_at, time.monotonic()
        if self._interrupted_at - before < ONE_PRESS_SECONDS:
            return
        if self._noted is ExitCode.INTERRUPTED:
            os._exit(ExitCode.INTERRUPTED)
        else:
            self._noted = ExitCode.INTERRUPTED


def asked_to_stop() -> ExitCode | None:
    """Return what the entered `StopSignals` of this process has recorded; None: no request."""
    handler = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return handler.requested if isinstance(handler, StopSignals) else None


def stop_votes(requested: ExitCode | None) -> list[bool]:
    """Return the two numbers that a rank adds to a sum over ranks, so that all agree to stop."""
    return [requested is ExitCode.INTERRUPTED, requested is ExitCode.REQUEUE]


def agreed_stop(votes: Sequence[float]) -> ExitCode | None:
    """Return the exit code of all ranks from the summed `stop_votes`; None: continue."""
    interrupts, requeues = votes
    return ExitCode.INTERRUPTED if interrupts else ExitCode.REQUEUE if requeues else None


def _reset_in_child(owner: int) -> None:
    """Reset the handlers in a forked loader worker: signals to the rank must not stop it early."""
    if os.getppid() == owner:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
