"""A folder is used by one process, with file locks and without."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys

import pytest

from data_pipeline.loading.claims import claim_folder, release

KEEPER = """
import errno, fcntl, sys
from pathlib import Path
if sys.argv[2] == "without":
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks here")
    fcntl.flock = refuse
from data_pipeline.loading.claims import claim_folder
folder, claim = claim_folder(Path(sys.argv[1]))
print(folder.name, flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["with locks", "without"])
def locks(request, monkeypatch):
    if request.param == "without":

        def refuse(*_):
            raise OSError(errno.ENOLCK, "no locks here")

        monkeypatch.setattr(fcntl, "flock", refuse)
    return request.param


def test_a_folder_that_another_process_uses_is_left_to_it_until_it_ends(tmp_path, locks):
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, str(tmp_path / "cache"), locks.partition(" ")[0]],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert keeper.stdout.readline() == "cache\n"
    mine, claim = claim_folder(tmp_path / "cache")
    assert mine.name == "cache-1"
    release(claim)
    keeper.kill()
    keeper.communicate()
    again, claim = claim_folder(tmp_path / "cache")
    assert again.name == "cache"
    release(claim)


def test_a_claim_ends_with_its_release(tmp_path, locks):
    for _ in range(2):
        folder, claim = claim_folder(tmp_path / "cache")
        assert folder == tmp_path / "cache"
        release(claim)


def test_other_errors_of_the_lock_are_not_hidden(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="broken"):
        claim_folder(tmp_path / "cache")
