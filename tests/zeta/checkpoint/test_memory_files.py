"""What is held in memory reaches the disk byte for byte, hashed."""

import hashlib
from pathlib import Path

import pytest
import torch

from zeta.checkpoint.hashed_file import write_hashed
from zeta.checkpoint.memory_files import HeldFiles

LARGE = 5_000_000
"""Numbers of a tensor that takes more than one block of memory."""


def _write(files, folder):
    records = {record.path: record for record in files.write(folder)}
    files.drop()
    return records


def test_files_are_those_of_torch_save_and_hashed_as_they_are_on_the_disk(tmp_path):
    content = {"w": torch.arange(LARGE), "views": list(torch.ones(4, 3)), "name": "é"}
    files = HeldFiles()
    files.hold("zero/a.pt", content)
    files.hold_text("config.yaml", "lr: 1\n" * 3)
    records = _write(files, tmp_path)
    for name, record in records.items():
        data = (tmp_path / name).read_bytes()
        assert record.size == len(data)
        assert record.sha256 == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "config.yaml").read_text() == "lr: 1\n" * 3
    loaded = torch.load(tmp_path / "zero/a.pt", weights_only=True, mmap=True)
    assert torch.equal(loaded["w"], content["w"])
    assert loaded["name"] == "é"
    storages = {view.untyped_storage().data_ptr() for view in loaded["views"]}
    assert len(storages) == 1  # what shares memory is written once


def test_what_is_held_does_not_change_with_the_tensor(tmp_path):
    files, weight = HeldFiles(), torch.ones(LARGE)
    files.hold("w.pt", weight)
    weight.zero_()
    _write(files, tmp_path)
    assert torch.load(tmp_path / "w.pt", weights_only=True).eq(1).all()


def test_memory_serves_again_and_leaves_nothing_of_the_file_before(tmp_path):
    files = HeldFiles()
    files.hold("w.pt", torch.ones(LARGE))
    _write(files, tmp_path)
    before = {id(block) for block in files._free}
    files.hold_text("short", "a")
    files.hold("w.pt", torch.zeros(LARGE - 1000))
    _write(files, tmp_path)
    assert {id(block) for block in files._free} >= before
    assert len(files._free) == len(before) + 1
    assert (tmp_path / "short").read_text() == "a"
    assert torch.load(tmp_path / "w.pt", weights_only=True).eq(0).all()


def test_the_checksums_of_torch_are_left_as_they_were():
    torch.serialization.set_crc32_options(True)
    HeldFiles().hold("a.pt", [1])
    assert torch.serialization.get_crc32_options()


def test_a_disk_that_takes_no_more_is_an_error(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "a").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_hashed(tmp_path, tmp_path / "a", [memoryview(b"content")])
