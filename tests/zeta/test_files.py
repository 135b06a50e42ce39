"""Files that are whole or absent."""

import errno
import os
from pathlib import Path

import pytest

from zeta.files import local_path, sync, write_whole, write_whole_text


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


@pytest.mark.parametrize(
    "text", ["s3://bucket/run", "s3:/bucket/run", "GS://b/r", "file:///tmp/x", "hdfs:/x"]
)
def test_a_url_is_no_output(text):
    for given in (text, Path(text)):  # pathlib makes one slash of two
        with pytest.raises(ValueError, match=r"OUT is .* a URL"):
            local_path(given, "OUT")


@pytest.mark.parametrize("text", ["$SCRATCH/run", "${SCRATCH}/run", "/data/$USER", "a-$x"])
def test_a_variable_that_no_shell_expanded_is_no_output(text):
    with pytest.raises(ValueError, match="is not expanded here"):
        local_path(text, "OUT")


@pytest.mark.parametrize("text", ["c:relative", "a:b/c", "100%/x", "cost$/x"])
def test_odd_names_of_local_paths_are_taken_as_they_are(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_path(text, "OUT") == Path(text)


def test_the_home_folder_is_expanded_and_an_unknown_one_refused(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/me")
    assert local_path("~/a", "OUT") == Path("/home/of/me/a")
    with pytest.raises(ValueError, match="the home folder of ~no-such-user is not known"):
        local_path("~no-such-user/a", "OUT")
