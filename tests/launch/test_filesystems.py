"""Which filesystem a folder lies on, from the kernel's list of mounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.filesystems import existing_parent, filesystem_kind, only_here, perhaps_only_here

MOUNTS = """\
/dev/vda / ext4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
server:/x /shared\\040data nfs4 rw 0 0
/dev/vdb /shared\\040data/scratch xfs rw 0 0
tmpfs /over tmpfs rw 0 0
lustre@tcp:/l /over lustre rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/nowhere/runs", "ext4"),
        ("/tmp/x/y", "tmpfs"),
        ("/tmpfile", "ext4"),
        ("/shared data/runs", "nfs4"),
        ("/shared data/scratch/runs", "xfs"),
        ("/over", "lustre"),
    ],
)
def test_the_innermost_and_latest_mount_counts(path, kind):
    assert filesystem_kind(Path(path), MOUNTS) == kind


def test_this_machine_tells_as_well(tmp_path):
    assert filesystem_kind(tmp_path / "to be made") not in ("", "unknown")


def test_memory_is_seen_by_one_node_and_a_disk_perhaps():
    assert only_here("tmpfs")
    assert perhaps_only_here("ext4")
    for kind in ("nfs4", "lustre", "gpfs", "fuse.beegfs", "unknown"):
        assert not only_here(kind)
        assert not perhaps_only_here(kind)


def test_the_nearest_folder_that_exists_is_found(tmp_path):
    assert existing_parent(tmp_path / "a" / "b") == tmp_path
    assert existing_parent(tmp_path) == tmp_path
