import errno
import fcntl

import pytest

from data_pipeline.shards.atomic_file import remove_leftovers, write_atomically


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_flock_files_are_written_and_leftovers_stay(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    leftover = tmp_path / ".a.tar.1.tmp"
    leftover.touch()
    with write_atomically(tmp_path / "a.tar") as stream:
        stream.write(b"whole")
    remove_leftovers(tmp_path)  # perhaps another writer is at it: nobody can tell
    assert (tmp_path / "a.tar").read_bytes() == b"whole"
    assert leftover.exists()
