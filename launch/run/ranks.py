"""Start the processes of a run on this machine and watch them until all have ended.

Each process has RANK, WORLD_SIZE, LOCAL_RANK and the address of rank 0 in its environment. Signals
are passed on to every rank; one failing rank ends the others; no rank outlives this process.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from launch.run.orphans import Guardian
from zeta.distributed import LAUNCHED_RANKS, RankInfo, rank_from_environment
from zeta.exit_codes import ExitCode
from zeta.run.signals import ONE_PRESS_SECONDS

_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SECONDS_AFTER_SAVE = 120.0
"""Time for the other ranks to end after one that saved; all left the same barrier."""
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Outcome:
    """The end of a run: the statuses of its ranks, and the signals that this process received."""

    codes: tuple[int, ...]
    """Exit status of each rank; if a signal ended it, minus the signal number."""
    killed: frozenset[int]
    """Ranks that were ended because another one failed; their status means nothing."""
    aborted: bool
    """Whether a second Ctrl-C killed the ranks."""
    signalled: bool
    """Whether this process received a signal to stop, and passed it on to the ranks."""


def run_ranks(
    command: Sequence[str], nproc: int, *, seconds_after_failure: float = 10.0
) -> Outcome:
    """Run `command` as `nproc` ranks and wait for all of them.

    Once a rank fails, the others have `seconds_after_failure` to notice and report the failure
    before they are killed.

    Call it from the main thread: it handles SIGINT (passed on once; the second kills), SIGTERM,
    SIGHUP, SIGUSR1 and SIGUSR2 until it returns.
    """
    ranks = _Ranks()
    with ranks.forwarding_signals():
        ranks.start(command, nproc)
        codes = ranks.wait(seconds_after_failure)
    return Outcome(tuple(codes), frozenset(ranks.killed), ranks.interrupts > 1, ranks.signalled)


def starter(environment: Mapping[str, str]) -> RankInfo:
    """Return the rank of a process that is to start ranks of its own, which should be the only one.

    The shell of `srun --ntasks=4 --pty` has the variables of the first of four tasks, though the
    others do nothing: ranks that are started there are a world of their own.

    Raises:
        ValueError: it is one of several ranks already.
    """
    info = rank_from_environment(environment)
    if info.from_slurm and info.rank == 0:
        return RankInfo()
    if info.world_size > 1:
        raise ValueError("--nproc starts ranks, and this is already one of several: leave it out")
    return info


def rank_environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    """Return the environment of one rank, as torch.distributed and DeepSpeed read it."""
    threads = str(max(1, _cores() // nproc))
    return {
        "OMP_NUM_THREADS": threads,
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_RANK": str(rank),
        "LOCAL_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        LAUNCHED_RANKS: str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """Return a TCP port on which nothing on this machine listens.

    It is below the range that systems use for outgoing connections, so that no such connection
    takes it before rank 0 listens.
    """
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free TCP port between 20000 and 32000 on 127.0.0.1")


class _Ranks:
    """The rank processes, each in its own session, so that it receives a Ctrl-C only once."""

    def __init__(self) -> None:
        self.killed: set[int] = set()
        """Ranks that were ended because another one failed; their status means nothing."""
        self.interrupts = 0
        """Number of Ctrl-C so far."""
        self.signalled = False
        """Whether a signal was passed on to the ranks."""
        self._interrupted_at = float("-inf")
        self._started = False
        self._held: list[int] = []
        """Signals that came before every rank had started."""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._guardian = Guardian()

    def start(self, command: Sequence[str], nproc: int) -> None:
        """Start the ranks."""
        port = free_port()
        for rank in range(nproc):
            process = subprocess.Popen(
                command,
                env=rank_environment(rank, nproc, port),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._processes.append(process)
            self._guardian.add(process.pid)
        self._started = True
        for number in self._held:
            self._send(number)
        if self.interrupts > 1:
            self._kill(range(nproc))

    @contextlib.contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """Pass signals on to the ranks; a second Ctrl-C kills them."""
        wanted = dict.fromkeys(_FORWARDED, self._forward) | {signal.SIGINT: self._interrupt}
        before = {
            number: signal.signal(number, handler)
            for number, handler in wanted.items()
            if signal.getsignal(number) is not signal.SIG_IGN  # keep ignoring SIGHUP under nohup
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._kill(range(len(self._processes)))
            self._guardian.dismiss()

    def wait(self, seconds_after_failure: float) -> list[int]:
        """Wait until every rank has ended and return their statuses; negative: minus the signal."""
        deadline = float("inf")
        while True:
            codes = [process.poll() for process in self._processes]
            running = [rank for rank, code in enumerate(codes) if code is None]
            if not running:
                return [code for code in codes if code is not None]
            deadline = min(deadline, time.monotonic() + _patience(codes, seconds_after_failure))
            if time.monotonic() > deadline:
                self.killed.update(running)
                self._kill(running)
            time.sleep(_POLL_SECONDS)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        # A rank saves and ends on SIGTERM; a closed terminal (SIGHUP) means the same.
        self._send(signal.SIGTERM if number == signal.SIGHUP else number)

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        before, self._interrupted_at = self._interrupted_at, time.monotonic()
        if self._interrupted_at - before < ONE_PRESS_SECONDS:
            return
        self.interrupts += 1
        if self.interrupts > 1:
            self._kill(range(len(self._processes)))
            return
        print("\nzeta: saving and stopping; press Ctrl-C again to end at once", file=sys.stderr)
        self._send(signal.SIGINT)

    def _send(self, number: int) -> None:
        self.signalled = True
        if not self._started:  # a rank that runs may not be in the list yet
            self._held.append(number)
            return
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _kill(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            # The group outlives its leader if a rank died and left loader workers behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._processes[rank].pid, signal.SIGKILL)


def _patience(codes: Sequence[int | None], seconds_after_failure: float) -> float:
    """Return the seconds that running ranks may still take, given the statuses of the others."""
    ended = {code for code in codes if code is not None} - {0}
    if not ended:
        return float("inf")
    saved = {int(ExitCode.REQUEUE), int(ExitCode.INTERRUPTED)}
    return _SECONDS_AFTER_SAVE if ended <= saved else seconds_after_failure


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # counts the cores that this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
