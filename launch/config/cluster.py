"""Config of the cluster (`cluster.*`): sbatch options, environment of the ranks, container.

Nothing here changes the result of training, so a resumed run may change all of it. The values are
requests: the number of ranks of a run is the number that Slurm started.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from zeta.config_field import check_choice, check_range, free

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(^|_)(API_?KEY|TOKEN|SECRET|PASSWORD)(_|$)", re.IGNORECASE)


@dataclass
class ContainerConfig:
    """The container that the ranks run in; `zeta` must be installed in its image."""

    kind: str = free("auto")
    """none, pyxis (a plugin of srun), apptainer, or auto: none if no image is set, apptainer if the
    image ends in .sif, else pyxis."""
    image: str | None = free(None)
    """Image for pyxis or apptainer: a file that every node sees, or a name in a registry."""
    mounts: list[str] = free(factory=list)
    """Folders of the node that are visible inside, as SOURCE:TARGET or SOURCE:TARGET:ro."""

    def __post_init__(self) -> None:
        check_choice("cluster.container.kind", self.kind, ("auto", "none", "pyxis", "apptainer"))
        if self.runtime == "none" and (self.image is not None or self.mounts):
            raise ValueError(
                f"cluster.container.image is {self.image!r} and cluster.container.mounts is "
                f"{self.mounts!r}, but there is no container: set cluster.container.image and "
                "leave cluster.container.kind out, or leave all of them out"
            )
        if self.runtime != "none" and not self.image:
            raise ValueError(
                f"cluster.container.kind is {self.kind}, but cluster.container.image is not set: "
                "give the image, or set cluster.container.kind=none"
            )
        for mount in self.mounts:
            parts = mount.split(":")
            # Commas separate mounts, for pyxis and apptainer alike, and neither can escape them.
            if len(parts) not in (2, 3) or not all(parts) or "," in mount:
                raise ValueError(
                    f"cluster.container.mounts holds {mount!r}; a mount is SOURCE:TARGET or "
                    "SOURCE:TARGET:ro, without commas"
                )

    @property
    def runtime(self) -> str:
        """The kind of container: none, pyxis or apptainer."""
        if self.kind != "auto":
            return self.kind
        if self.image is None:
            return "none"
        return "apptainer" if self.image.endswith(".sif") else "pyxis"

    def srun_options(self, variables: list[str]) -> list[str]:
        """Return the arguments of srun for this container; empty except for pyxis.

        Args:
            variables: names of the variables that override those of the image.
        """
        if self.runtime != "pyxis":
            return []
        options = [f"--container-image={self.image}"]
        if self.mounts:
            options.append(f"--container-mounts={','.join(self.mounts)}")
        if variables:
            options.append(f"--container-env={','.join(variables)}")
        return options

    def command_prefix(self, *, gpus: bool) -> list[str]:
        """Return the words in front of a rank's command; empty except for apptainer.

        Args:
            gpus: whether the ranks need the driver of the node's GPUs inside.
        """
        if self.runtime != "apptainer":
            return []
        binds = [word for mount in self.mounts for word in ("--bind", mount)]
        return ["apptainer", "exec", *(["--nv"] if gpus else []), *binds, str(self.image)]


@dataclass
class ClusterConfig:
    """Request to Slurm; unset values are left to the defaults of the cluster."""

    partition: str | None = free(None)
    """Partition (queue) of the job."""
    account: str | None = free(None)
    """Account that the job is charged to."""
    qos: str | None = free(None)
    """Quality of service of the job."""
    time: str | None = free(None)
    """Time limit of one job: HH:MM:SS, MM:SS, or D-HH:MM:SS. A run may take many jobs."""
    nodes: str | None = free(None)
    """Number of nodes, or MIN-MAX: after a node fails, the run continues on the remaining nodes."""
    gpus_per_node: int | None = free(None)
    """GPUs of a node; each gets one rank."""
    tasks_per_node: int | None = free(None)
    """Ranks of a node that trains on CPUs; on GPUs each GPU gets one rank."""
    cpus_per_task: int | None = free(None)
    """Cores of a rank and its loader workers."""
    mem: str | None = free(None)
    """Memory of a node, as in 200G; 0: all of it."""
    constraint: str | None = free(None)
    """Features that nodes must have."""
    exclude: str | None = free(None)
    """Nodes to avoid, as in n[3,7]."""
    environment: dict[str, str] = free(factory=dict)
    """Environment variables of every rank: NCCL, threads, caches. They override those of the
    submitting shell; the variables of several files and settings are merged."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    preflight: bool = free(True)
    """Check every node before the ranks start, and requeue the job without the bad nodes."""
    preflight_timeout_s: float = free(300.0)
    """Seconds after which a node that does not answer in preflight counts as bad."""

    def __post_init__(self) -> None:
        self._check_text()
        self._check_environment()
        if self.time is not None and self.time.isdecimal():
            raise ValueError(
                f"cluster.time is {self.time!r}; write HH:MM:SS, in quotes in a YAML file (YAML "
                "takes 24:00:00 for a number of seconds), as in '24:00:00'"
            )
        if self.nodes is not None:
            node_range(self.nodes)
        for name in ("gpus_per_node", "tasks_per_node", "cpus_per_task"):
            value = getattr(self, name)
            if value is not None:
                check_range(f"cluster.{name}", value, 1)
        check_range("cluster.preflight_timeout_s", self.preflight_timeout_s, 1, 86400)

    @property
    def preflight_limit_s(self) -> float:
        """Longest time of a preflight, in seconds: two waits for the nodes, then measurements."""
        return 2 * self.preflight_timeout_s + 300

    def _check_text(self) -> None:
        names = ("partition", "account", "qos", "time", "nodes", "mem", "constraint", "exclude")
        for name in names:
            value = getattr(self, name)
            if value is not None and (not value.strip() or not value.isprintable()):
                raise ValueError(f"cluster.{name} is {value!r}; give a name, or leave it out")

    def _check_environment(self) -> None:
        for name, value in self.environment.items():
            if not _VARIABLE.fullmatch(name):
                raise ValueError(
                    f"cluster.environment holds {name!r}; the name of a variable has letters, "
                    "digits and _ only"
                )
            if "\n" in value or "\0" in value:
                raise ValueError(f"cluster.environment.{name} is {value!r}; it must be one line")
            if _SECRET.search(name):
                raise ValueError(
                    f"cluster.environment holds {name}: the config of a run is saved and logged, "
                    "so no secret may be in it; export it in the shell that submits instead"
                )


def seconds_of(time: str) -> int | None:
    """Return the seconds of a Slurm time limit; None if it is unlimited or not a time limit.

    The forms are MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM and D-HH:MM:SS.
    """
    match = re.fullmatch(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]+))?(?::([0-9]+))?", time)
    if match is None:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:
        numbers.insert(0, 0)  # the first one is minutes, not hours
    hours, minutes, seconds = [*numbers, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def node_range(text: str) -> tuple[int, int]:
    """Return the (smallest, largest) number of nodes in a text such as "4" or "2-4".

    Raises:
        ValueError: the text has neither form.
    """
    match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise ValueError(
            f"cluster.nodes is {text!r}; it must be a number of nodes, or MIN-MAX as in 2-4"
        )
    return least, most
