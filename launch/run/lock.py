"""Let one run at a time train in a run directory, however the one before it ended.

Every start claims the next number, `owners/000001.json` and so on, by creating the file with
O_EXCL, which is atomic on NFS as well; the highest number is the owner. Numbers are never reused,
so if two starts find the same dead owner, only one of them succeeds it. A run that ends marks its
file. An owner that could not do so is checked in this order: its process, on the machine where it
ran; else its Slurm job; else whether its heartbeat still changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from launch.slurm_queries import SlurmUnavailableError, ask_queue
from zeta.exit_codes import RunError
from zeta.files import as_record, read_json, write_whole_text
from zeta.run.directory import RunDir

_WRITING_S = 10.0
"""Seconds that a claim may exist without its content, while it is being made."""
_SHORTEST_WATCH_S = 30.0
_BEATS = 4
"""Number of heartbeats that an owner has to miss before it is taken to be gone."""
_LOOK_S = 0.5


@dataclass(frozen=True)
class Owner:
    """A process that trains, or trained, in a run directory."""

    host: str
    machine: str
    """Boot and process namespace in which `pid` is valid; empty if either is unknown."""
    pid: int
    pid_started: str
    """Start time of the process in kernel ticks, to recognise a later process with the same id."""
    time: float
    """Time of the claim, in seconds since 1970."""
    heartbeat_s: float
    """Seconds between two heartbeats of its rank 0."""
    job: str | None = None
    """Slurm job; None outside of Slurm."""
    restarts: int = 0
    """Number of times that the job had been requeued before."""
    cluster: str | None = None
    """Slurm cluster that the job id belongs to; None: unknown."""
    released: bool = False
    """Whether the run has ended by itself and given up the directory."""

    def __str__(self) -> str:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.time))
        job = "" if self.job is None else f"job {self.job}, "
        return f"{job}process {self.pid} on {self.host}, since {began}"


def this_owner(environment: Mapping[str, str], heartbeat_s: float) -> Owner:
    """Describe this process as an owner, with the Slurm job named in `environment`."""
    return Owner(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        pid_started=_process_start(os.getpid()) or "",
        time=time.time(),
        heartbeat_s=heartbeat_s,
        job=environment.get("SLURM_JOB_ID"),
        restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
        cluster=environment.get("SLURM_CLUSTER_NAME"),
    )


class RunLock:
    """The claim of one process on a run directory; rank 0 takes it for all ranks."""

    def __init__(self, run_dir: RunDir, owner: Owner) -> None:
        """Prepare a claim; `acquire` makes it."""
        self._run_dir, self._owner = run_dir, owner
        self._claimed: Path | None = None

    def acquire(self) -> None:
        """Claim the directory, and create it if it is missing.

        This is immediate if there is no owner, or if its process or job can be queried. An owner on
        another machine that is known only by its heartbeats is watched until a heartbeat comes, or
        for half a minute, after which it is taken to be gone.

        Raises:
            RunError: another run owns the directory.
            OSError: the directory cannot be written.
        """
        folder = self._run_dir.owners
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            number = _newest(folder)
            owner = _read(folder / _name(number)) if number else None
            if owner is not None and not self._is_gone(owner):
                raise RunError(
                    f"{self._run_dir.path} is in use: another run trains there ({owner}). Let it "
                    f"end, ask it to (touch {self._run_dir.stop_request}), or choose another "
                    "run.dir"
                )
            with contextlib.suppress(FileExistsError):  # another start was faster: look again
                _create(folder / _name(number + 1), self._owner)
                self._claimed = folder / _name(number + 1)
                return

    @property
    def proof(self) -> str:
        """The text by which another machine recognises this directory; empty without a claim."""
        if self._claimed is None:
            return ""
        return f"{self._claimed.name}\n{self._claimed.read_text(encoding='utf-8')}"

    def close(self) -> None:
        """Give up the directory, if this process owns it."""
        if self._claimed is None:
            return
        released = replace(self._owner, released=True)
        # On a full disk the claim stays; the next start finds that this process is gone.
        with contextlib.suppress(OSError):
            write_whole_text(self._claimed, json.dumps(asdict(released)) + "\n", durable=False)
        self._claimed = None

    def _is_gone(self, owner: Owner) -> bool:
        """Return whether the owner no longer trains."""
        me = self._owner
        same_job = owner.job is not None and (owner.job, owner.cluster) == (me.job, me.cluster)
        if owner.released or (same_job and owner.restarts < me.restarts):
            return True
        if owner.machine and owner.machine == me.machine:
            return _process_start(owner.pid) != owner.pid_started
        foreign = None not in (owner.cluster, me.cluster) and owner.cluster != me.cluster
        if owner.job is not None and not same_job and not foreign:
            in_queue = _is_in_queue(owner.job)
            if in_queue is not None:
                return not in_queue
        return self._is_silent(owner)

    def _is_silent(self, owner: Owner) -> bool:
        """Return whether rank 0 writes no heartbeat; clocks may differ, so none are compared."""
        seconds = max(_SHORTEST_WATCH_S, _BEATS * owner.heartbeat_s)
        print(
            f"zeta: another run was in {self._run_dir.path} ({owner}); watching for up to "
            f"{seconds:g} s whether it still is",
            file=sys.stderr,
            flush=True,
        )
        heartbeat = self._run_dir.rank_heartbeat(0)
        before, deadline = _content(heartbeat), time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            if _content(heartbeat) != before:
                return False
        return True


def sees_claim(run_dir: RunDir, proof: str, patience_s: float = 10.0) -> bool:
    """Return whether this machine sees another machine's claim; network storage may be slow.

    Args:
        run_dir: the directory as this machine sees it.
        proof: `RunLock.proof` on the other machine.
        patience_s: seconds to look for the claim.
    """
    name, _, content = proof.partition("\n")
    deadline = time.monotonic() + patience_s
    while _content(run_dir.owners / name) != content.encode():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True


def last_owner(run_dir: RunDir) -> Owner | None:
    """Return the current or last owner of a directory; None: no owner, or it cannot be read."""
    number = _newest(run_dir.owners)
    try:
        return _parse(run_dir.owners / _name(number)) if number else None
    except OSError:
        return None


def lives_here(owner: Owner) -> bool | None:
    """Return whether the process of an owner is running; None: this machine cannot see it."""
    if not owner.machine or owner.machine != _machine():
        return None
    return _process_start(owner.pid) == owner.pid_started


def _name(number: int) -> str:
    return f"{number:06d}.json"


def _newest(folder: Path) -> int:
    """Return the highest number that was claimed; 0 if none was."""
    return max((int(path.stem) for path in folder.glob("[0-9]*.json")), default=0)


def _create(path: Path, owner: Owner) -> None:
    with path.open("x", encoding="utf-8") as file:  # O_CREAT | O_EXCL
        try:
            file.write(json.dumps(asdict(owner)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            path.unlink()
            raise


def _read(path: Path) -> Owner | None:
    """Read a claim; None if its process was killed before the claim was complete."""
    deadline = time.monotonic() + _WRITING_S
    while (owner := _parse(path)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return owner


def _parse(path: Path) -> Owner | None:
    try:
        record = read_json(path, limit=2**20, what="delete it")
        known = {field.name: record[field.name] for field in fields(Owner)}
        return as_record(Owner, known, place=str(path), what="delete it")
    except (ValueError, KeyError, TypeError):
        return None


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:  # not there yet, or just being replaced on NFS
        return None


def _machine() -> str:
    """Return this boot of the machine and its namespace of process ids; empty: unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return ""


def _process_start(pid: int) -> str | None:
    """Return the start time of a process in kernel ticks since boot; None: it is not running."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state[0] in "ZX" else state[19]


def _is_in_queue(job: str) -> bool | None:
    """Return whether the job is running or waiting in Slurm's queue; None: unknown."""
    try:
        states = ask_queue("--format=%T", f"--jobs={job}")
    except SlurmUnavailableError:
        return None
    return None if "COMPLETING" in states else bool(states)
