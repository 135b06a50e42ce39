"""Check one node from inside: GPUs, disks, shards, the run directory.

Every check returns its findings as text, because the first node reports them for all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from data_pipeline.shards.remote import is_remote
from data_pipeline.shards.weighted import open_shards
from launch.config.load import ZetaConfig
from launch.errors import USER_ERRORS, message

_GIB = 2**30
_LEAST_FREE = 1 * _GIB
_LEAST_INODES = 1000
_BUSY_SHARE = 0.1
"""Share of a GPU's memory: more than this in use before a run starts is another process."""
_SMI_S = 60.0


def gpu_faults(expected: int | None) -> list[str]:
    """Check the GPUs that this process sees.

    Args:
        expected: number that there should be; None: unknown.
    """
    visible = torch.cuda.device_count()
    if expected is not None and visible < expected:
        return [f"{visible} of {expected} GPUs are there"]
    faults = []
    for index in range(visible):
        try:
            name = torch.cuda.get_device_properties(index).name
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            faults.append(f"cuda:{index}: {str(error).splitlines()[0]}")
            continue
        if free < (1 - _BUSY_SHARE) * total:
            faults.append(
                f"cuda:{index} ({name}) has {free / _GIB:.1f} of {total / _GIB:.1f} GiB free: "
                "another process is on it"
            )
    return faults + (ecc_faults() if visible else [])


def ecc_faults() -> list[str]:
    """Return the GPUs with uncorrectable memory errors, as far as nvidia-smi reports them."""
    fields = "index,ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_S)
    except FileNotFoundError:
        return []
    except subprocess.TimeoutExpired:
        return [f"nvidia-smi did not answer in {_SMI_S:g} s"]
    if asked.returncode != 0:
        return [f"nvidia-smi: {(asked.stdout + asked.stderr).strip() or 'failed'}".splitlines()[0]]
    rows = [row.split(",") for row in asked.stdout.splitlines() if row.count(",") == 1]
    counts = [(index.strip(), count.strip()) for index, count in rows]
    return [  # "[N/A]" where there is no ECC
        f"GPU {index} has {count} uncorrectable memory errors (ECC) since it was reset"
        for index, count in counts
        if count.isdecimal() and int(count) > 0
    ]


def shard_view(config: ZetaConfig) -> tuple[str, list[str]]:
    """Open the shards as a run does; return (fingerprint, findings). It is empty where they fail.

    The fingerprint covers names, sizes and times of all shards, those held out included.
    """
    fingerprints = []
    data = config.data
    for spec in (data.shards, data.val_shards, data.probe_shards, data.probe_val_shards):
        if spec is None:
            continue
        try:
            fingerprints.append(open_shards(spec).fingerprint)
        except USER_ERRORS as error:
            return "", [message(error)]
    return " ".join(fingerprints), []


def folder_faults(folder: Path, name: str, least_bytes: int = _LEAST_FREE) -> list[str]:
    """Check that files can be made in `folder`, or where it would be made, and that there is room.

    Args:
        folder: need not exist.
        name: the config field that sets it.
        least_bytes: bytes that have to be free.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        disk = os.statvfs(folder)
    except OSError as error:
        return [f"{name}: nothing can be written in {folder} ({error.strerror})"]
    faults = []
    free = disk.f_bavail * disk.f_frsize
    if free < least_bytes:
        faults.append(
            f"{name}: {free / _GIB:.2f} GiB are free in {folder}, {least_bytes / _GIB:.2f} needed"
        )
    if disk.f_files and disk.f_favail < _LEAST_INODES:  # some file systems count none
        faults.append(f"{name}: {folder} has room for {disk.f_favail} more files only (inodes)")
    return faults


def cache_faults(config: ZetaConfig) -> list[str]:
    """Check the folder that shards are fetched to, where they are remote."""
    specs = config.data.shards
    listed = specs if isinstance(specs, Sequence) and not isinstance(specs, str) else [specs]
    paths = [spec["path"] if isinstance(spec, dict) else spec for spec in listed]
    if not any(isinstance(path, str) and is_remote(path) for path in paths):
        return []
    folder = Path(config.data.cache_dir or tempfile.gettempdir()).expanduser()
    return folder_faults(folder, "data.cache_dir")


def file_system(path: Path) -> str:
    """Return the kind of file system that `path` lies on, such as nfs4 or ext4; empty: unknown."""
    while not path.exists() and path != path.parent:
        path = path.parent
    if shutil.which("findmnt") is None:
        return ""
    asked = subprocess.run(
        ["findmnt", "--noheadings", "--output=FSTYPE", f"--target={path.resolve()}"],
        capture_output=True,
        text=True,
    )
    return asked.stdout.strip().splitlines()[-1] if asked.stdout.strip() else ""


ON_ONE_MACHINE = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay"})
"""Kinds of file systems that other machines do not see."""
