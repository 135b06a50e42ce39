"""What a killed save left and cannot be deleted is left for the next start."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace

from zeta.checkpoint import store as module
from zeta.checkpoint.store import CheckpointStore, _unused
from zeta.distributed import RankInfo, World


def test_a_busy_leftover_is_said_and_does_not_end_the_start(tmp_path, monkeypatch):
    said = []
    world = World(RankInfo(), SimpleNamespace(type="cpu"))
    store = CheckpointStore(tmp_path, world, keep_last=1, keep_every=None, say=said.append)
    for name in (".tmp-old-step_00000004", ".tmp-step_00000008", ".tmp-old-step_00000002"):
        (tmp_path / name).mkdir()
    real = module.shutil.rmtree

    def busy(path, *options):
        if path.name == ".tmp-old-step_00000004":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), ".nfs0001")
        real(path, *options)

    monkeypatch.setattr(module.shutil, "rmtree", busy)
    assert store.newest_verified() is None
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-old-step_00000004"]
    assert len(said) == 1
    assert "cannot be deleted now (OSError" in said[0]
    assert "the next start tries again" in said[0]


def test_a_new_leftover_gets_a_name_of_its_own(tmp_path):
    path = tmp_path / ".tmp-old-step_00000004"
    assert _unused(path) == path
    path.mkdir()
    assert _unused(path).name == ".tmp-old-step_00000004-1"
