"""A real Slurm cluster on loopback, for the length of a test session.

slurmctld, one slurmd for each node and a munged of our own, all in one folder, on free ports, as
children of this process. Nothing of a Slurm that the machine may already have is touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest

TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel")
ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL",
    "DEADLINE", "PREEMPTED",
}  # fmt: skip
_SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

_CONF = """
ClusterName=zeta-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
FirstJobId={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=5,defer_batch
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
KillWait=15
MinJobAge=3600
MaxJobCount=1000
SlurmdParameters=config_overrides
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed.txt
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
{partitions}
"""
_ALL_NODES = ("PartitionName=main Nodes=ALL Default=YES PreemptMode=OFF",)


def missing_tools() -> list[str]:
    """Return what keeps a cluster from being started here, if anything."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_SEARCH) is None]
    if not missing and os.geteuid() != 0:
        missing = ["root (slurmd starts jobs as their users)"]
    return missing


class Cluster:
    """Start it with `start`, always `stop` it. Commands and jobs see it through `environment`."""

    def __init__(
        self, nodes: int = 2, cpus_per_node: int = 4, partitions: Sequence[str] = _ALL_NODES
    ) -> None:
        # Sockets lie here, and their paths may have no more than 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="zslurm-", dir="/tmp"))
        self.folder.chmod(0o755)  # munged refuses a folder that others cannot enter
        self.node_names = [f"n{number}" for number in range(1, nodes + 1)]
        self._cpus = cpus_per_node
        self._partitions = partitions
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": _SEARCH,
        }
        for name in [name for name in self.environment if name.startswith(("SLURM_", "SBATCH_"))]:
            if name != "SLURM_CONF":
                del self.environment[name]

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        host = socket.gethostname().split(".")[0]
        ports = _free_ports(1 + len(self.node_names))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={self._cpus} State=UNKNOWN"
            for name, port in zip(self.node_names, ports[1:], strict=True)
        )
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(
            _CONF.format(
                host=host,
                controller_port=ports[0],
                folder=self.folder,
                nodes=nodes,
                partitions="\n".join(self._partitions),
            )
        )
        self._start_munge()
        self._start("slurmctld", "slurmctld", "-D", "-i")
        for name in self.node_names:
            self.start_node(name)
        self.wait_until(
            lambda: all("State=IDLE" in self.node(name) for name in self.node_names), 60
        )

    def stop(self) -> None:
        """End every daemon, job step and job, and remove the folder; also after a failed start."""
        if "slurmctld" in self._daemons and self._daemons["slurmctld"].poll() is None:
            with contextlib.suppress(subprocess.SubprocessError):
                self.run("scancel", "--user=root", timeout=10)
        for daemon in self._daemons.values():
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=3)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        # Step daemons and tasks leave the process tree; our SLURM_CONF in them says whose they are.
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        self._start(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """Lose a node as if its power failed: its slurmd, its steps and their tasks."""
        daemon = self._daemons.pop(name)  # nobody is to wonder where it is
        daemon.kill()
        # All at once, as far as others can see: first they stop, so that none tells of another.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in self.processes():
                if self._is_on(name, pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
        daemon.wait()

    def _is_on(self, name: str, pid: int) -> bool:
        """Whether a process is a task of the node, or one of the step daemons in front of it."""
        if _environment(pid).get("SLURMD_NODENAME") == name:
            return True
        log = self.folder / f"slurmd.{name}.log"  # which its step daemons write to
        return "slurmstepd" in _command_line(pid) and log in _open_files(pid)

    def run(self, *command: object, timeout: float = 30, **options: object) -> str:
        """Run a Slurm command against this cluster and return its output."""
        return subprocess.run(
            [str(word) for word in command],
            env=self.environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout,
            **options,
        ).stdout

    def submit(self, *arguments: object, cwd: Path | None = None) -> int:
        """Submit with sbatch and return the job id."""
        return int(self.run("sbatch", "--parsable", *arguments, cwd=cwd).split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """Return Slurm's record of a job (`scontrol show job`)."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def node(self, name: str) -> str:
        """Return Slurm's record of a node, as text."""
        return self.run("scontrol", "--oneliner", "show", "node", name)

    def wait_for_job(
        self, job: int, states: Iterable[str] = ENDED, timeout: float = 120, every: float = 0.2
    ) -> dict:
        """Wait until the job is in one of the states and return its record."""
        wanted = set(states)
        self.wait_until(lambda: self.job(job)["JobState"] in wanted, timeout, every)
        return self.job(job)

    def completed(self, job: int) -> list[dict[str, str]]:
        """Return the completion records of a job, one for each time it ended or was requeued."""
        path = self.folder / "completed.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        records = [dict(w.partition("=")[::2] for w in line.split() if "=" in w) for line in lines]
        return [record for record in records if record.get("JobId") == str(job)]

    def wait_until(self, condition: Callable[[], bool], timeout: float, every: float = 0.2) -> None:
        """Wait until `condition` holds; fail with the daemons' last words when it does not."""
        deadline = time.monotonic() + timeout
        while not condition():
            daemons = list(self._daemons.items())
            dead = [name for name, daemon in daemons if daemon.poll() is not None]
            if time.monotonic() > deadline or dead:
                raise TimeoutError(f"gave up waiting; ended daemons: {dead}\n{self._last_words()}")
            time.sleep(every)

    def processes(self) -> list[int]:
        """Return all processes that belong to this cluster: daemons, steps and tasks."""
        conf = self.environment["SLURM_CONF"]
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        ours = [pid for pid in pids if _environment(pid).get("SLURM_CONF") == conf]
        return [pid for pid in ours if pid != os.getpid()]

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        names = {"key-file": "key", "pid-file": "pid", "seed-file": "seed", "socket": "socket"}
        files = [f"--{option}={self.folder}/munge.{ending}" for option, ending in names.items()]
        log = f"--log-file={self.folder}/munge.log"
        self._start("munged", "munged", "--foreground", "--force", *files, log)
        self.wait_until((self.folder / "munge.socket").exists, 10)

    def _start(self, name: str, *command: str) -> None:
        # The kernel ends the daemons should this process be killed before it can `stop` them.
        tie = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [*tie, *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _last_words(self) -> str:
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(files)
        )


@contextlib.contextmanager
def running(make: Callable[[], Cluster]) -> Iterator[Cluster]:
    """Start the cluster that `make` returns, and stop it; skip the test where none can be."""
    missing = missing_tools()
    if missing:
        pytest.skip(f"no Slurm cluster here: {', '.join(missing)} missing")
    cluster = make()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def _environment(pid: int) -> dict[str, str]:
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    words = raw.decode(errors="replace").split("\0")
    return dict(word.partition("=")[::2] for word in words if "=" in word)


def _open_files(pid: int) -> list[Path]:
    try:
        return [link.readlink() for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
