"""Signals that ask a run to save and end, as a flag that is read at the step boundary."""

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
"""SIGINT again so soon is the same Ctrl-C: `timeout`, `uv run` and others pass on what the terminal
sends to the whole group anyway."""


class StopSignals:
    """While entered: USR1, USR2 and TERM ask to save and requeue, INT to save and end.

    A second INT ends the process at once. The handlers do nothing but note the signal. One that is
    entered while another is begins with what that one has noted.

    Args:
        also: asked besides, whenever `requested` is read; what it returns must not go back to None.
        interrupts: note INT too; else it stays what it was.
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
        """The exit code that was asked for; None while nobody asked."""
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


def stop_votes(requested: ExitCode | None) -> list[bool]:
    """Return what a rank adds to a sum over ranks, so that all agree to stop: two numbers."""
    return [requested is ExitCode.INTERRUPTED, requested is ExitCode.REQUEUE]


def agreed_stop(votes: Sequence[float]) -> ExitCode | None:
    """Return what all ranks exit with, from the summed `stop_votes`; None: go on."""
    interrupts, requeues = votes
    return ExitCode.INTERRUPTED if interrupts else ExitCode.REQUEUE if requeues else None


def _reset_in_child(owner: int) -> None:
    """Loader workers are forked from us: what is meant for the rank must not stop them early."""
    if os.getppid() == owner:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
