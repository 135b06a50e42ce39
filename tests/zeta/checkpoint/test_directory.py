"""A checkpoint directory is whole and of a known format, or refused with the reason."""

import json

import pytest

from zeta.checkpoint.directory import (
    FORMAT,
    find_fault,
    load_full_weights,
    open_zero_state,
    read_trainer_state,
    write_manifest,
)
from zeta.checkpoint.hashed_file import write_text
from zeta.exit_codes import RunError
from zeta.run.directory import step_names

NAMES = ("config.yaml", "ranks/rank_00000.pt", "trainer.json", "zero/b")
STATE = {"world_size": 2, "zero_stage": 1, "progress": {}, "parameters": {"a": [1, 2]}}


@pytest.fixture
def directory(tmp_path):
    """A small checkpoint directory of one file of each kind that it must have."""
    path = tmp_path / "step_00000012"
    for folder in (path, path / "ranks", path / "zero"):
        folder.mkdir()
    records = [write_text(path, path / name, "content of a file") for name in NAMES]
    write_manifest(path, records)
    return path


def test_a_whole_directory_has_no_fault(directory):
    assert find_fault(directory) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: (d / "zero/b").write_bytes(b"content of A file"),
            "content of zero/b has changed",
        ),
        (lambda d: (d / "zero/b").write_bytes(b"short"), "zero/b has 5 bytes, not 17"),
        (lambda d: (d / "zero/b").unlink(), "b is missing"),
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
    (directory / "zero/b").write_bytes(b"content of A file")
    assert find_fault(directory, rank=0, ranks=2) is None
    assert find_fault(directory, rank=1, ranks=2) is not None


def test_only_step_directories_are_listed_oldest_first(tmp_path):
    names = ["step_00000010", "step_00000002", ".tmp-step_00000011", "step_00000009.bad-1"]
    for name in [*names, "latest"]:
        (tmp_path / name).mkdir()
    assert step_names(tmp_path) == ["step_00000002", "step_00000010"]


@pytest.mark.parametrize("form", [{}, {"format": 1}, {"format": FORMAT}])
def test_a_checkpoint_of_this_format_or_an_older_one_is_read(tmp_path, form):
    state = STATE | form
    (tmp_path / "trainer.json").write_text(json.dumps(state))
    assert read_trainer_state(tmp_path) == state


def test_a_checkpoint_of_a_newer_format_is_refused_with_both_numbers(tmp_path):
    (tmp_path / "trainer.json").write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(RunError) as refused:
        read_trainer_state(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path} was written by a newer zeta, in format {FORMAT + 1}; this one reads up to "
        f"format {FORMAT}: upgrade zeta"
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "lists no trainer.json"),
        ([], "lists no files"),
        ({"trainer.json": [1, "a"]}, "lists no config.yaml"),
        ({"/dev/zero": [0, "a"]}, "lists '/dev/zero', which is not inside"),
        ({"../other": [0, "a"]}, "not inside the checkpoint"),
        ({"zero/../../x": [0, "a"]}, "not inside the checkpoint"),
        ({"trainer.json": 5}, "no size and SHA-256"),
        ({"trainer.json": [None, "a"]}, "no size and SHA-256"),
    ],
)
def test_a_list_holds_what_a_checkpoint_must_have_and_names_inside_it(directory, files, message):
    (directory / "manifest.json").write_text(json.dumps({"files": files}))
    assert message in str(find_fault(directory))


def test_a_device_in_the_place_of_a_file_is_not_read(directory):
    (directory / "zero/b").unlink()
    (directory / "zero/b").symlink_to("/dev/zero")
    assert find_fault(directory) == "zero/b is not a regular file"


@pytest.mark.parametrize(
    "change",
    [
        {"world_size": "2"},
        {"zero_stage": None},
        {"progress": []},
        {"parameters": {"a": "x"}},
        {"parameters": {"a": [-1]}},
        {"parameters": {"a": [True]}},
        {"parameters": 7},
        {"format": "new"},
        {"format": True},
    ],
)
def test_a_trainer_state_that_was_rewritten_is_refused_in_one_line(tmp_path, change):
    for text in (json.dumps(STATE | change), "[" * 10**5, "7", '{"a": ' + "9" * 400 + "}"):
        (tmp_path / "trainer.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"trainer\.json is damaged .* move .* away"
        ) as refused:
            read_trainer_state(tmp_path)
        assert "\n" not in str(refused.value)


def test_an_entry_that_is_missing_is_named_where_it_is_needed(tmp_path):
    state = {name: value for name, value in STATE.items() if name != "zero_stage"}
    with pytest.raises(ValueError, match=r"trainer\.json is damaged \(zero_stage is missing\)"):
        open_zero_state(tmp_path, state)
