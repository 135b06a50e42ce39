"""The `zeta` command as a process of its own, for tests of whole runs.

The process is forked from one that has imported everything, which takes seconds and is the same for
every command. `tests/launch/test_cli.py` starts `python -m launch` itself.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

_IMPORTED = ["launch.cli", "launch.run.train", "zeta.train.trainer", "launch.evaluate.scores"]


def zeta(
    *arguments: str, cwd: Path, timeout: float = 500, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `zeta ARGUMENTS` in a folder, with one thread a process.

    Args:
        arguments: words of the command.
        cwd: folder to run it in.
        timeout: seconds after which it is killed.
        environment: variables besides those of this process.

    Raises:
        subprocess.TimeoutExpired: it did not end in time.
    """
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = context.Process(target=_run, args=(arguments, cwd, variables, out, err))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["zeta", *arguments], timeout, out.read_bytes())
        assert process.exitcode is not None
        return subprocess.CompletedProcess(
            ["zeta", *arguments], process.exitcode, out.read_text(), err.read_text()
        )


def _run(
    arguments: tuple[str, ...], cwd: Path, variables: dict[str, str], out: Path, err: Path
) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 # as long as the process lives
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    sys.argv = ["zeta", *arguments]  # commands that start ranks pass on their own words
    import torch

    torch.set_num_threads(1)
    from launch.cli import entry_point

    sys.exit(entry_point(arguments))
