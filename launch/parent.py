"""Ties the life of a rank to the launcher that started it, whatever ends the launcher."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading

FD_VARIABLE = "ZETA_LAUNCHER_FD"
"""Environment variable with the read end of a pipe whose write end only the launcher holds."""
_PR_SET_PDEATHSIG = 1


def die_with_launcher() -> None:
    """End this process and its workers at once when the launcher is gone; no-op without one.

    The pipe reports end of file once the launcher has ended, killed or not, on any system. On Linux
    the kernel also kills a rank whose interpreter is stuck.
    """
    descriptor = os.environ.pop(FD_VARIABLE, None)
    if descriptor is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_wait, args=(int(descriptor),), name="launcher", daemon=True).start()


def _wait(descriptor: int) -> None:
    os.read(descriptor, 1)  # nothing is ever written: this returns at end of file only
    with contextlib.suppress(ProcessLookupError):
        os.killpg(os.getpid(), signal.SIGKILL)  # a rank leads its own group: its workers end too
    os._exit(1)
