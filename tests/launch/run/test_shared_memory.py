"""Shared memory that is read-only, small or full is named before a run starts."""

from __future__ import annotations

import errno
from collections import namedtuple

import pytest

from launch.run import shared_memory
from launch.run.shared_memory import check_shared_memory

NEEDED = (4 * 16 + 64) * 1024
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def usage(monkeypatch):
    def be(total, free):
        monkeypatch.setattr(
            shared_memory.shutil, "disk_usage", lambda folder: Usage(total, total - free, free)
        )

    return be


def test_enough_is_enough_and_no_workers_need_none(tmp_path, usage):
    usage(NEEDED, NEEDED)
    check_shared_memory(4, tmp_path)
    usage(0, 0)
    check_shared_memory(0, tmp_path)
    check_shared_memory(4, tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_a_container_with_64_mb_has_room_for_hundreds_of_workers(tmp_path, usage):
    usage(64_000_000, 64_000_000)
    check_shared_memory(200, tmp_path)


def test_too_little_is_a_setting_to_change_and_a_full_one_may_empty(tmp_path, usage):
    usage(NEEDED - 1, NEEDED - 1)
    with pytest.raises(ValueError, match=r"4 workers .* take 128 KiB .*127 KiB.*--shm-size=1g"):
        check_shared_memory(4, tmp_path)
    usage(NEEDED, NEEDED - 1)
    with pytest.raises(OSError, match=r"128 KiB of locks of 4 workers; remove files"):
        check_shared_memory(4, tmp_path)


def test_a_read_only_one_is_named(tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr(shared_memory.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"nothing can be written there \(Read-only file system\)"):
        check_shared_memory(4, tmp_path)
