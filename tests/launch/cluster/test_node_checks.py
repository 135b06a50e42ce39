"""What a node finds wrong with itself; GPUs and their tools are played."""

import os
from types import SimpleNamespace

import pytest
import torch

from data_pipeline.shards.build import build_shards
from launch.cluster import node_checks
from launch.cluster.node_checks import (
    cache_faults,
    ecc_faults,
    file_system,
    folder_faults,
    gpu_faults,
    shard_view,
)
from launch.config.load import load_config
from tests.data_pipeline.shard_fixtures import jpeg


def program(folder, name, body, monkeypatch):
    """Put a program of that name first on PATH."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs of 80 GiB, with so many free."""
    free = {0: 79, 1: 79}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name="NVIDIA Z80")
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (free[i] * 2**30, 80 * 2**30))
    monkeypatch.setattr(node_checks, "ecc_faults", list)
    return free


def test_gpus_that_are_there_and_free_are_well(two_gpus):
    assert gpu_faults(2) == []
    assert gpu_faults(None) == []


def test_missing_gpus_are_counted(two_gpus):
    assert gpu_faults(8) == ["2 of 8 GPUs are there"]


def test_a_gpu_that_another_process_is_on_is_named(two_gpus):
    two_gpus[1] = 30
    (found,) = gpu_faults(2)
    assert found == ("cuda:1 (NVIDIA Z80) has 30.0 of 80.0 GiB free: another process is on it")


def test_a_gpu_that_does_not_answer_is_named(two_gpus, monkeypatch):
    def lost(index):
        raise RuntimeError("CUDA error: unknown error\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)
    assert gpu_faults(2) == [f"cuda:{i}: CUDA error: unknown error" for i in range(2)]


def test_uncorrectable_memory_errors_are_named_and_gpus_without_ecc_are_not(tmp_path, monkeypatch):
    answer = "printf '0, 0\\n1, 3\\n2, [N/A]\\n'"
    program(tmp_path, "nvidia-smi", answer, monkeypatch)
    assert ecc_faults() == ["GPU 1 has 3 uncorrectable memory errors (ECC) since it was reset"]


def test_a_driver_that_fails_is_a_fault_and_none_at_all_is_not(tmp_path, monkeypatch):
    words = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    program(tmp_path, "nvidia-smi", f'echo "{words}"; exit 9', monkeypatch)
    assert ecc_faults() == [f"nvidia-smi: {words}"]
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert ecc_faults() == []


def test_a_folder_without_room_or_without_inodes_is_a_fault(tmp_path, monkeypatch):
    there = tmp_path / "not" / "made"
    assert folder_faults(there, "run.dir") == []
    assert not (tmp_path / "not").exists()
    (full,) = folder_faults(there, "run.dir", 2**60)
    assert full.startswith("run.dir: ")
    assert f"GiB are free in {tmp_path}, 1073741824.00 needed" in full
    disk = SimpleNamespace(f_bavail=2**40, f_frsize=1, f_files=5000, f_favail=7)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    assert folder_faults(tmp_path, "run.dir") == [
        f"run.dir: {tmp_path} has room for 7 more files only (inodes)"
    ]


def test_a_folder_that_cannot_be_written_is_a_fault():
    (found,) = folder_faults(node_checks.Path("/proc/run"), "run.dir")
    assert found.startswith("run.dir: nothing can be written in /proc (")


def test_the_cache_is_checked_where_shards_are_remote_only(tmp_path, monkeypatch):
    monkeypatch.setattr(node_checks.folder_faults, "__defaults__", (2**60,))

    def found(shards):
        return cache_faults(
            load_config("demo", [f"data.shards={shards}", f"data.cache_dir={tmp_path}"])
        )

    assert found("/data/a.tar") == []
    for remote in ("https://h/a.tar", "[/data/a.tar, 's3://b/a.tar']", "[{path: 'gs://b/a.tar'}]"):
        (fault,) = found(remote)
        assert fault.startswith("data.cache_dir: ")


def test_shards_that_cannot_be_seen_are_named_and_others_have_another_fingerprint(tmp_path):
    def view(*settings):
        return shard_view(load_config("demo", list(settings)))

    absent, faults = view(f"data.shards={tmp_path / 'absent'}")
    assert absent == ""
    assert str(tmp_path / "absent") in faults[0]
    for count in (3, 4):
        samples = [(f"s{i}", {"jpg": jpeg(24, 24, i), "cls": b"0"}) for i in range(count)]
        build_shards(samples, tmp_path / str(count), class_names=["a"])
    shards = [f"data.shards={tmp_path / '3'}"]
    first, none = view(*shards)
    assert none == []
    assert view(*shards) == (first, [])
    assert view(f"data.shards={tmp_path / '4'}")[0] != first
    assert view(*shards, f"data.val_shards={tmp_path / '4'}")[0] != first
    assert view(*shards, f"data.val_shards={tmp_path / 'absent'}")[0] == ""


def test_the_kind_of_a_file_system_is_told_of_folders_that_are_not_made_yet():
    assert file_system(node_checks.Path("/proc/self/nothing/there")) == "proc"
