"""Retries of transient storage failures, with growing pauses and a deadline."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 15.0


class PermanentError(OSError):
    """The error for a failure that a retry cannot fix."""


def with_retries(function: Callable[[], Result], deadline_s: float) -> Result:
    """Return ``function()``; retry after each `OSError` until `deadline_s` seconds are over.

    The pause doubles from 0.1 s to 15 s; half of it is random, so that a thousand workers do not
    come back at once. It is at least the `retry_after_s` of the error.

    Raises:
        PermanentError: raised by `function`, never retried.
        OSError: the last error of `function`, after the deadline.
    """
    end = time.monotonic() + deadline_s
    pause = _FIRST_PAUSE_S
    while True:
        try:
            return function()
        except PermanentError:
            raise
        except OSError as error:
            wait = max(pause * random.uniform(0.5, 1), getattr(error, "retry_after_s", 0.0))
            if time.monotonic() + wait > end:
                raise
        time.sleep(wait)
        pause = min(2 * pause, _LONGEST_PAUSE_S)
