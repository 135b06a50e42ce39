"""A checkpoint directory is whole, or what is wrong with it is said."""

import pytest

from zeta.checkpoint.directory import find_fault, load_full_weights, write_manifest
from zeta.checkpoint.hashed_file import write_text
from zeta.run.directory import step_names


@pytest.fixture
def directory(tmp_path):
    """A small checkpoint directory of two files."""
    path = tmp_path / "step_00000012"
    path.mkdir()
    records = [write_text(path, path / name, "content of a file") for name in ("a", "b")]
    write_manifest(path, records)
    return path


def test_a_whole_directory_has_no_fault(directory):
    assert find_fault(directory) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "b").write_bytes(b"content of A file"), "content of b has changed"),
        (lambda d: (d / "b").write_bytes(b"short"), "b has 5 bytes, not 17"),
        (lambda d: (d / "b").unlink(), "b is missing"),
        (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda d: (d / "manifest.json").write_text("{}"), "manifest.json .* cannot be read"),
        (lambda d: (d / "manifest.json").write_text("[1"), "manifest.json .* cannot be read"),
    ],
)
def test_any_damage_is_found_and_named(directory, damage, message):
    damage(directory)
    assert find_fault(directory) is not None
    with pytest.raises(ValueError, match=message):
        load_full_weights(directory)


def test_ranks_share_the_reading_and_miss_nothing(directory):
    (directory / "b").write_bytes(b"content of A file")
    assert find_fault(directory, rank=0, ranks=2) is None
    assert find_fault(directory, rank=1, ranks=2) is not None


def test_only_step_directories_are_listed_oldest_first(tmp_path):
    names = ["step_00000010", "step_00000002", ".tmp-step_00000011", "step_00000009.bad-1"]
    for name in [*names, "latest"]:
        (tmp_path / name).mkdir()
    assert step_names(tmp_path) == ["step_00000002", "step_00000010"]
