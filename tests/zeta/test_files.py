"""Files that are whole or absent."""

import errno
import os

import pytest

from zeta.files import sync, write_whole, write_whole_text


def test_a_reader_sees_the_old_content_until_the_new_is_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with write_whole(path) as stream:
        stream.write(b"ne")
        assert path.read_text() == "old"
        stream.write(b"w")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_old_content_stays_and_nothing_lies_beside_it(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def interrupted():
        with write_whole(path) as stream:
            stream.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fails_is_an_error_of_the_writer_and_leaves_the_old_content(
    tmp_path, monkeypatch
):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_whole_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("durable", [True, False])
def test_the_disk_is_waited_for_where_that_is_asked_for_content_then_name(
    tmp_path, monkeypatch, durable
):
    synced = []
    original = os.fsync

    def note(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        original(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_whole_text(tmp_path / "a.json", "new", durable=durable)
    content, name = (tmp_path / "a.json").stat().st_ino, tmp_path.stat().st_ino
    assert synced == ([content, name] if durable else [])


def test_a_file_system_that_cannot_sync_folders_is_no_failure_but_a_broken_disk_is(
    tmp_path, monkeypatch
):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    number = errno.EINVAL
    sync(tmp_path)
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        sync(tmp_path)
