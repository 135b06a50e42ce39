"""Starts the ranks of a run on this machine, under the contract that a Slurm step follows.

A rank is `python -m launch train CONFIG ...` with RANK, WORLD_SIZE, LOCAL_RANK and the address of
the first rank in its environment. Signals are passed on to every rank; one failing rank ends the
others; no rank outlives the launcher.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from launch.config import ZetaConfig, load_config
from launch.parent import FD_VARIABLE
from zeta.exit_codes import ExitCode
from zeta.run_dir import RunDir

_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SECONDS_AFTER_FAILURE = 10.0
"""How long other ranks may take to notice a failed one and report, before they are killed."""
_SECONDS_AFTER_SAVE = 120.0
"""How long other ranks may take to end after one that saved; all left the same barrier."""
_POLL_SECONDS = 0.05


def launch_local(config: str, overrides: Sequence[str], nproc: int) -> int:
    """Train on `nproc` ranks on this machine and wait for the end.

    Args:
        config: a YAML file, or the name of a shipped recipe.
        overrides: `key=value` settings.
        nproc: number of ranks.

    Returns:
        The exit status of the run: see `combined_exit_code`.

    Raises:
        ValueError: the config is wrong, or asks for fewer packs a step than there are ranks; said
            here once, before any rank starts.
    """
    checked = load_config(config, overrides)
    _check_ranks(checked, nproc)
    ranks = _Ranks()
    with ranks.forwarding_signals():
        ranks.start([sys.executable, "-m", "launch", "train", config, *overrides], nproc)
        codes = ranks.wait()
    _report_failures(codes, RunDir(Path(checked.run.dir)), ranks.killed)
    return combined_exit_code([code for rank, code in enumerate(codes) if rank not in ranks.killed])


def combined_exit_code(codes: Sequence[int]) -> int:
    """Return the status of the whole run from those of its ranks, in the order that they matter.

    Never restart (93) before saved (85) before interrupted (130) before a crash; 0 if all are 0.
    A rank that a signal ended counts as 128 + signal, as in a shell.
    """
    plain = [128 - code if code < 0 else code for code in codes]
    for code in (ExitCode.NEVER_RESTART, ExitCode.REQUEUE, ExitCode.INTERRUPTED):
        if code in plain:
            return int(code)
    return next((code for code in plain if code != 0), 0)


def rank_environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    """Return the environment of one rank: what torch.distributed and DeepSpeed read."""
    threads = str(max(1, _cores() // nproc))
    return {
        "OMP_NUM_THREADS": threads,
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_RANK": str(rank),
        "LOCAL_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """Return a TCP port that nothing on this machine listens on.

    Below the range from which systems take ports for outgoing connections, so that none of those
    takes it before rank 0 listens.
    """
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free TCP port between 20000 and 32000 on 127.0.0.1")


class _Ranks:
    """The rank processes, each in a session of its own so that a terminal's Ctrl-C comes once."""

    def __init__(self) -> None:
        self.killed: set[int] = set()
        """Ranks that were ended because another one failed; their status says nothing."""
        self._interrupts = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        # Ranks hold the read end: end of file tells them that this process is gone.
        self._read_end, self._write_end = os.pipe()

    def start(self, command: Sequence[str], nproc: int) -> None:
        """Start the ranks."""
        port = free_port()
        for rank in range(nproc):
            process = subprocess.Popen(
                command,
                env=rank_environment(rank, nproc, port) | {FD_VARIABLE: str(self._read_end)},
                stdin=subprocess.DEVNULL,
                pass_fds=(self._read_end,),
                start_new_session=True,
            )
            self._processes.append(process)

    @contextlib.contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """Pass signals on to the ranks; a second Ctrl-C kills them."""
        wanted = dict.fromkeys(_FORWARDED, self._forward) | {signal.SIGINT: self._interrupt}
        before = {
            number: signal.signal(number, handler)
            for number, handler in wanted.items()
            if signal.getsignal(number) is not signal.SIG_IGN  # nohup ignores SIGHUP: so do we
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._kill(range(len(self._processes)))
            os.close(self._read_end)
            os.close(self._write_end)

    def wait(self) -> list[int]:
        """Wait until every rank has ended and return their statuses; negative: minus the signal."""
        deadline = float("inf")
        while True:
            codes = [process.poll() for process in self._processes]
            running = [rank for rank, code in enumerate(codes) if code is None]
            if not running:
                return [code for code in codes if code is not None]
            deadline = min(deadline, time.monotonic() + _patience(codes))
            if time.monotonic() > deadline:
                self.killed.update(running)
                self._kill(running)
            time.sleep(_POLL_SECONDS)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        # A rank saves and ends on SIGTERM; a closed terminal asks for the same.
        self._send(signal.SIGTERM if number == signal.SIGHUP else number)

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            self._kill(range(len(self._processes)))
            return
        print("\nzeta: saving and stopping; Ctrl-C again ends at once", file=sys.stderr)
        self._send(signal.SIGINT)

    def _send(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _kill(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            # The group outlives its leader where a rank died and left loader workers behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._processes[rank].pid, signal.SIGKILL)


def _patience(codes: Sequence[int | None]) -> float:
    """Return for how many seconds running ranks may go on, given how others ended."""
    ended = {code for code in codes if code is not None} - {0}
    if not ended:
        return float("inf")
    saved = {int(ExitCode.REQUEUE), int(ExitCode.INTERRUPTED)}
    return _SECONDS_AFTER_SAVE if ended <= saved else _SECONDS_AFTER_FAILURE


def _check_ranks(config: ZetaConfig, nproc: int) -> None:
    if nproc < 1:
        raise ValueError(f"--nproc is {nproc}; it must be at least 1")
    if nproc > config.train.packs_per_step:
        raise ValueError(
            f"--nproc is {nproc}, but a step has only train.packs_per_step = "
            f"{config.train.packs_per_step} packs to share; start fewer ranks or raise it"
        )


def _report_failures(codes: Sequence[int], run_dir: RunDir, killed: set[int]) -> None:
    """Name the ranks that failed and their logs; the ranks say themselves what went wrong."""
    expected = {0, int(ExitCode.REQUEUE), int(ExitCode.INTERRUPTED)}
    for rank, code in enumerate(codes):
        if code in expected or rank in killed:
            continue
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        print(f"zeta: rank {rank} {how}; see {run_dir.rank_log(rank)}", file=sys.stderr)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # counts the cores that this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
