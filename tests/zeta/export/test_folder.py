"""What a killed export leaves is removed by the next one, and nothing else is."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.zeta.small_models import small
from tests.zeta.training import ROOT
from zeta.export.folder import remove_leftovers, whole_directory
from zeta.export.saving import save_pretrained
from zeta.models.exported import read_config

_EXPORTING = """
import sys, time
from zeta.export.folder import whole_directory
with whole_directory(sys.argv[1]) as partial:
    (partial / "model.safetensors").write_bytes(b"half")
    print(partial, flush=True)
    time.sleep(600)
"""


def export_until_killed(out: Path) -> "tuple[subprocess.Popen[str], Path]":
    """Start a process that writes an export to `out` and never ends; return what it writes to."""
    process = subprocess.Popen(
        [sys.executable, "-c", _EXPORTING, str(out)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def write_export(out: Path, content: str) -> None:
    with whole_directory(out) as partial:
        (partial / "model.safetensors").write_text(content)
        (partial / "config.json").write_text('{"format": "zeta-1"}')


@pytest.fixture
def dead_id() -> int:
    """Id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_the_next_export_removes_what_a_killed_one_left_but_not_what_is_being_written(tmp_path):
    killed, leftover = export_until_killed(tmp_path / "out")
    other, in_use = export_until_killed(tmp_path / "out")
    try:
        killed.kill()
        killed.wait()
        assert leftover.is_dir()
        write_export(tmp_path / "out", "whole")
        assert names_in(tmp_path) == sorted([in_use.name, "out"])
        assert (tmp_path / "out/model.safetensors").read_text() == "whole"
        assert names_in(tmp_path / "out") == ["config.json", "model.safetensors"]
    finally:
        other.kill()
        other.wait()
    remove_leftovers(tmp_path / "out")
    assert names_in(tmp_path) == ["out"]


def test_an_export_that_another_machine_is_writing_is_left_alone(tmp_path, dead_id):
    theirs = tmp_path / f".tmp-out-{dead_id}"
    theirs.mkdir()
    with (theirs / ".writing").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_leftovers(tmp_path / "out")
        assert theirs.is_dir()
    remove_leftovers(tmp_path / "out")
    assert not theirs.exists()


def test_nothing_but_an_unfinished_export_of_the_same_name_is_removed(tmp_path, dead_id):
    kept = {
        f".tmp-other-{dead_id}",
        f".tmp-out2-{dead_id}",
        f".tmp-out-5-{dead_id}",
        f".tmp-out-{dead_id}-mine",
        f".tmp-out-{os.getppid()}",
        ".tmp-out-x",
        ".tmp-out-",
        ".tmp-out",
        f"out-{dead_id}",
    }
    for name in kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
    (tmp_path / f".tmp-out-{dead_id}").symlink_to(tmp_path / "out2")
    (tmp_path / f".tmp-out-0{dead_id}").write_text("a file")
    before = names_in(tmp_path)
    write_export(tmp_path / "out", "new")
    assert names_in(tmp_path) == sorted([*before, "out"])


def test_a_former_export_is_kept_until_there_is_a_whole_one_again(tmp_path, dead_id):
    write_export(tmp_path / "out", "former")
    old = (tmp_path / "out").rename(tmp_path / f".tmp-out-{dead_id}-old")  # killed at this point
    (tmp_path / f".tmp-out-{dead_id}").mkdir()

    def fails() -> None:
        with whole_directory(tmp_path / "out"):
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        fails()
    assert (old / "model.safetensors").read_text() == "former"
    assert names_in(tmp_path) == [old.name]
    write_export(tmp_path / "out", "new")
    assert names_in(tmp_path) == ["out"]


def test_an_export_in_the_place_of_one_that_is_in_use_succeeds(tmp_path, monkeypatch):
    out = tmp_path / "out"
    model, arguments = small()
    save_pretrained(out, model.state_dict(), arguments, {"step": 1})
    real = shutil.rmtree

    def busy(path, ignore_errors=False, **options):
        if str(path).endswith("-old"):
            if ignore_errors:
                return
            raise OSError(39, "Directory not empty", str(path))
        real(path, ignore_errors=ignore_errors, **options)

    monkeypatch.setattr(shutil, "rmtree", busy)
    save_pretrained(out, model.state_dict(), arguments, {"step": 2})
    assert read_config(out)["info"] == {"step": 2}
