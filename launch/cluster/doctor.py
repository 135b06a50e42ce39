"""Check from the login node whether a run can work on a cluster: `zeta launch doctor`.

It takes seconds, submits nothing and writes nothing. What only the nodes know (devices, what they
see of the disks, the network between them) is checked by the job itself before it trains.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.shards.remote import is_remote
from launch.cluster.probe import Partition, chances, partitions, srun_knows
from launch.cluster.slurm import absolute_run_dir, cores_warning, job_for, most_ranks
from launch.config.cluster import node_range
from launch.config.load import ZetaConfig, load_config
from launch.errors import USER_ERRORS, message
from launch.filesystems import existing_parent, filesystem_kind, only_here, perhaps_only_here
from launch.run.checks import CheckedRun, abstract_model, check_start
from launch.run.pace import forecast, pace_rows, run_length
from launch.slurm_queries import SlurmUnavailableError
from zeta.train.hardware import Accelerator
from zeta.train.memory_model import state_memory
from zeta.train.optim import state_per_weight

State = Literal["ok", "warning", "failed"]
_GIB = 2**30
_IMAGE_FILES = (".sqsh", ".sif")


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    state: State
    subject: str
    finding: str
    """The finding and, unless it is ok, what to do about it."""


def examine(
    config_name: str, overrides: Sequence[str], gpu: Accelerator | None = None
) -> Iterator[Check]:
    """Yield the checks of a run, each as soon as it is known.

    A check that depends on one that failed is left out.

    Args:
        config_name: name or path of the config.
        overrides: settings that win over it.
        gpu: the GPU of each rank; None: what it takes is not compared with the loader.
    """
    try:
        config = load_config(config_name, overrides)
    except USER_ERRORS as error:
        yield Check("failed", "config", message(error))
        return
    yield Check("ok", "config", f"{config_name}, run {config.run.name}")
    ranks = 1
    try:
        ranks = most_ranks(config)
        nodes = node_range(str(config.cluster.nodes))[1]
        yield Check("ok", "ranks", f"{ranks} at most, on {config.cluster.nodes} nodes")
    except ValueError as error:
        nodes = 1
        yield Check("failed", "ranks", message(error))
    several = nodes > 1
    run_dir = absolute_run_dir(config).path
    yield place("run directory", run_dir, several=several)
    try:
        checked = check_start(config, ranks)
    except USER_ERRORS as error:
        yield Check("failed", "start", message(error))
    else:
        yield from _start(checked, several=several)
        yield from _pace(checked, ranks, gpu)
    if (warning := cores_warning(config)) is not None:
        yield Check("warning", "cores", warning)
    yield _program(config, several=several)
    yield from _slurm(config, config_name, overrides)
    yield from container(config, run_dir)
    yield wandb_mode(config)


def place(subject: str, path: Path, *, several: bool) -> Check:
    """Check that all nodes can see a folder, as far as the kind of its filesystem shows."""
    kind = filesystem_kind(path)
    on = f"{path}, on {kind}"
    if several and only_here(kind):
        return Check("failed", subject, f"{on}: no other node sees it; choose a shared folder")
    if several and perhaps_only_here(kind):
        return Check(
            "warning", subject, f"{on}: a disk of this node; make sure that all nodes see it"
        )
    return Check("ok", subject, on)


def disk(free: int, checkpoint: int, keep: int) -> Check:
    """Check the free bytes of the run directory against those of its checkpoints."""
    space = f"{_size(free)} free, about {_size(checkpoint)} a checkpoint"
    if free < 2 * checkpoint:  # the newest stays until the next one is whole
        return Check("failed", "disk", f"{space}: free some, or choose another run.dir")
    if free < (keep + 1) * checkpoint:
        fix = "free some, or lower train.keep_last"
        return Check("warning", "disk", f"{space}, of which {keep} are kept: {fix}")
    return Check("ok", "disk", f"{space}, of which {keep} are kept")


def partition_check(found: Sequence[Partition], config: ZetaConfig) -> Check:
    """Check that the partition that is asked for exists, with enough nodes and GPUs."""
    cluster = config.cluster
    names = cluster.partition.split(",") if cluster.partition else None
    chosen = [p for p in found if (p.is_default if names is None else p.name in names)]
    if not chosen:
        what = "there is no default partition" if names is None else f"no {cluster.partition!r}"
        known = ", ".join(partition.name for partition in found) or "none"
        return Check("failed", "partition", f"{what}; there are: {known} (--partition)")
    best = max(chosen, key=lambda partition: partition.usable)
    least = node_range(cluster.nodes)[0] if cluster.nodes else 1
    has = f"{best.name}: {best.nodes} nodes, {best.usable} usable, {best.idle} idle"
    gpus = max(partition.gpus_per_node for partition in chosen)
    if least > best.nodes:
        return Check("failed", "partition", f"{has}: fewer than --nodes {cluster.nodes}")
    if cluster.gpus_per_node is not None and cluster.gpus_per_node > gpus:
        fix = f"{gpus} GPUs a node, fewer than --gpus-per-node {cluster.gpus_per_node}"
        return Check("failed", "partition", f"{has}, {fix}")
    if least > best.usable:
        return Check("warning", "partition", f"{has}: the job waits until {least} are usable")
    return Check("ok", "partition", has)


def container(config: ZetaConfig, run_dir: Path) -> Iterator[Check]:
    """Check image and mounts of the container, as far as this machine can see them."""
    asked = config.cluster.container
    if asked.runtime == "none":
        return
    image = str(asked.image)
    is_file = "://" not in image and (image.startswith(("/", ".")) or image.endswith(_IMAGE_FILES))
    if not is_file:
        fix = "fetched by the nodes; whether it is there cannot be told from here"
        yield Check("warning", "container", f"{asked.runtime}, {image}: {fix}")
    elif not Path(image).exists():
        fix = "there is no such file; set cluster.container.image"
        yield Check("failed", "container", f"{image}: {fix}")
    else:
        yield Check("ok", "container", f"{asked.runtime}, {image}")
    mounts = [Path(mount.split(":")[0]) for mount in asked.mounts]
    missing = [str(source) for source in mounts if not source.exists()]
    if missing:
        yield Check("warning", "container", f"mounts that are not on this machine: {missing}")
    if not any(run_dir.is_relative_to(source) for source in mounts):
        fix = "unless the site mounts it, add it to cluster.container.mounts"
        yield Check("warning", "container", f"the run directory is in none of its mounts: {fix}")


def wandb_mode(config: ZetaConfig) -> Check:
    """Return where metrics will go."""
    from zeta.tracking.wandb_mode import resolve_mode

    mode = resolve_mode(config.tracker.wandb.mode, os.environ)
    finding = {
        "online": f"online, project {config.tracker.wandb.project}",
        "offline": "offline: no key, or offline by choice; `wandb login` here makes it online",
        "disabled": "disabled",
    }
    return Check("ok", "W&B", finding[mode])


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / 2**20:.1f} MiB"


def _slurm(config: ZetaConfig, config_name: str, overrides: Sequence[str]) -> Iterator[Check]:
    """Ask the cluster itself."""
    missing = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if missing:
        fix = "not on PATH; type this on a login node of the cluster"
        yield Check("failed", "Slurm", f"{', '.join(missing)} {fix}")
        return
    try:
        yield partition_check(partitions(), config)
        if config.cluster.container.runtime == "pyxis" and not srun_knows("--container-image"):
            fix = "srun has no --container-image here: the cluster lacks the plugin; use apptainer"
            yield Check("failed", "container", fix)
        taken, said = chances(job_for(config, [config_name, *overrides]))
        yield Check("ok" if taken else "failed", "job", said)
    except SlurmUnavailableError as error:
        yield Check("failed", "Slurm", str(error))
    except ValueError as error:  # no nodes or ranks are set, which has its own line
        yield Check("failed", "job", str(error))


def _program(config: ZetaConfig, *, several: bool) -> Check:
    """Check that the job will find the same installation."""
    if config.cluster.container.runtime != "none":
        return Check("ok", "zeta", "that of the container's image")
    folder = Path(sys.executable).parent
    if not (folder / "zeta").exists() and shutil.which("zeta") is None:
        fix = "not on PATH, where the job looks for it: activate the environment it is installed in"
        return Check("failed", "zeta", fix)
    return place("zeta", folder, several=several)


def _pace(checked: CheckedRun, ranks: int, gpu: Accelerator | None) -> Iterator[Check]:
    """Compare what a GPU takes with what the loader gives on this machine."""
    try:
        found = forecast(checked, gpu)
        rows = list(pace_rows(found, ranks, run_length(checked, ranks).images_left))
    except USER_ERRORS as error:
        yield Check("failed", "loader", message(error))
        return
    for subject, finding in rows:
        binds = subject == "binds" and found.loader_binds
        yield Check("warning" if binds else "ok", subject, finding)


def _start(checked: CheckedRun, *, several: bool) -> Iterator[Check]:
    if checked.already_finished is not None:
        yield Check("warning", "start", checked.already_finished)
    else:
        at = "from the beginning" if checked.saved is None else "from the newest checkpoint"
        yield Check("ok", "start", f"can start {at}")
    manifest = checked.manifest
    local = {Path(shard.path).parent for shard in manifest.shards if not is_remote(shard.path)}
    checks = [place("shards", folder.absolute(), several=several) for folder in sorted(local)]
    yield from [check for check in checks if check.state != "ok"]
    yield Check(
        "ok", "shards", f"{len(manifest.samples):,} images, {len(manifest.shards):,} tar files"
    )
    train = checked.config.train
    model = abstract_model(checked.config)
    sizes = [parameter.numel() for parameter in model.parameters()]
    moments = state_per_weight(checked.config.optim, model)
    checkpoint = state_memory(sizes, train, 1, moments=moments).lasting
    free = shutil.disk_usage(existing_parent(checked.run_dir.path)).free
    yield disk(free, checkpoint, train.keep_last)
