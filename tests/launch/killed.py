"""Processes of their own that have torch loaded from the start, and kill -9 at a chosen moment."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

_CHANGES = frozenset(
    ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
)
"""Audit events of the changes that Python makes to a file system, apart from `open`."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_PRELOAD = ("launch.export", "launch.recipes.finetune", "launch.run.train")


def run_apart(function: Callable[..., object], *arguments: Any) -> int:
    """Call a function of a module in another process; return its status, minus a signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOAD])
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join(240)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode


def run_killed(
    function: Callable[..., object], arguments: tuple[Any, ...], pattern: str, number: int
) -> bool:
    """Call a function in a process that is killed before a change; return whether it was.

    Args:
        function: function of a module.
        arguments: its arguments.
        pattern: regular expression that the path of the change contains.
        number: how many such changes come before.
    """
    status = run_apart(_call, function, arguments, pattern, number)
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def _call(
    function: Callable[..., object], arguments: tuple[Any, ...], pattern: str, number: int
) -> None:
    import torch

    torch.set_num_threads(1)
    wanted, left, owner = re.compile(pattern), [number], os.getpid()

    def die(event: str, values: tuple[Any, ...]) -> None:
        if event == "open":
            changes = isinstance(values[2], int) and values[2] & _WRITES
        else:
            changes = event in _CHANGES
        if not changes or os.getpid() != owner:
            return
        if any(isinstance(v, str | os.PathLike) and wanted.search(str(v)) for v in values):
            if left[0] == 0:
                os.kill(owner, signal.SIGKILL)
            left[0] -= 1

    sys.addaudithook(die)
    function(*arguments)
