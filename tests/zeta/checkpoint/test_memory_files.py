"""Files that are kept in memory reach the disk byte for byte, hashed."""

import hashlib
from pathlib import Path

import pytest
import torch

from zeta.checkpoint.hashed_file import write_hashed
from zeta.checkpoint.memory_files import MemoryFiles

LARGE = 20_000_000
"""Elements of a tensor whose file is written in more than one part."""


def _write(files, folder):
    records = {record.path: record for record in files.write(folder)}
    files.drop()
    return records


def test_files_are_those_of_torch_save_and_hashed_as_they_are_on_the_disk(tmp_path):
    content = {"w": torch.arange(LARGE), "views": list(torch.ones(4, 3)), "name": "é"}
    files = MemoryFiles()
    files.keep("zero/a.pt", content)
    files.keep_text("config.yaml", "lr: 1\n" * 3)
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


def test_a_kept_file_does_not_change_with_its_tensor(tmp_path):
    files, weight = MemoryFiles(), torch.ones(LARGE)
    files.keep("w.pt", weight)
    weight.zero_()
    _write(files, tmp_path)
    assert torch.load(tmp_path / "w.pt", weights_only=True).eq(1).all()


def test_memory_serves_again_and_leaves_nothing_of_the_file_before(tmp_path):
    files = MemoryFiles()
    files.keep("w.pt", torch.ones(LARGE))
    files.keep_text("once", "b")
    _write(files, tmp_path / "first")
    before = files._buffers["w.pt"].getbuffer().nbytes
    files.keep_text("short", "a")
    files.keep("w.pt", torch.zeros(LARGE - 1000))
    assert files._buffers["w.pt"].getbuffer().nbytes == before
    assert set(_write(files, tmp_path / "second")) == {"short", "w.pt"}
    assert (tmp_path / "second" / "short").read_text() == "a"
    loaded = torch.load(tmp_path / "second" / "w.pt", weights_only=True)
    assert torch.equal(loaded, torch.zeros(LARGE - 1000))


def test_the_checksums_of_torch_are_left_as_they_were():
    torch.serialization.set_crc32_options(True)
    MemoryFiles().keep("a.pt", [1])
    assert torch.serialization.get_crc32_options()


def test_a_disk_that_takes_no_more_is_an_error(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "a").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_hashed(tmp_path, tmp_path / "a", memoryview(b"content"))
