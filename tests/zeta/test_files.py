"""Files that are whole or absent, and JSON that others wrote."""

import errno
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from zeta.files import (
    as_record,
    parse_json,
    read_json,
    read_json_lines,
    sync,
    write_whole,
    write_whole_text,
)


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


WHAT = "delete it and type `zeta shards index s`"


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"", "line 1 column 1"),
        (b'{"a": 1,\n "b": }', "line 2 column 7"),
        (b'{"a": "\xff"}', "byte 7: not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"1" * 5000, "integer of 5000 digits"),
        (b"[18446744073709551616]", "integer of 20 digits"),
        (b'["\\ud800"]', "half of a surrogate pair"),
        (b"[1] 2", "line 1 column 5"),
        (b" " * 101, "more than 100 bytes"),
    ],
)
def test_json_that_is_damaged_names_file_place_and_fix(tmp_path, content, place):
    path = tmp_path / "facts.json"
    path.write_bytes(content)
    limit = 100 if place.startswith("more") else 10**6
    with pytest.raises(ValueError, match=re.escape(place)) as raised:
        read_json(path, limit=limit, what=WHAT)
    message = str(raised.value)
    assert str(path) in message
    assert message.endswith(WHAT)
    assert "\n" not in message
    # Parts of it that are read alone give the same errors.
    if not place.startswith("more"):
        with pytest.raises(ValueError, match=re.escape(place)):
            parse_json(content, place="here", what=WHAT)


def test_json_that_is_whole_is_returned(tmp_path):
    path = tmp_path / "facts.json"
    value = {"a": [1, -(2**63), 2**64 - 1, 0.5, None, True, "\U0001f600"]}
    path.write_text(json.dumps(value))  # escapes the emoji as a whole pair
    assert read_json(path, limit=1000, what=WHAT) == value


def test_json_is_read_from_regular_files_only(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # reading it would wait for ever
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            read_json(path, limit=10, what=WHAT)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent", limit=10, what=WHAT)


def test_a_damaged_json_line_is_named_by_its_number(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n\n[2]\n{')
    lines = read_json_lines(path, limit=1000, what=WHAT)
    assert [next(lines), next(lines)] == [(f"{path} line 1", {"a": 1}), (f"{path} line 3", [2])]
    with pytest.raises(ValueError, match=f"{path} line 4 is damaged.*column 2"):
        next(lines)


@dataclass(frozen=True)
class Facts:
    name: str
    count: int
    share: float = 0.0
    parts: dict[str, int] = field(default_factory=dict)
    notes: list[str] | None = None


def test_a_record_has_the_types_of_its_fields():
    whole = {"name": "a", "count": 1, "share": 2, "parts": {"x": 1}, "notes": ["n"]}
    assert as_record(Facts, whole, place="here", what=WHAT) == Facts("a", 1, 2, {"x": 1}, ["n"])
    assert as_record(Facts, {"name": "a", "count": 1}, place="here", what=WHAT).notes is None


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ([], "a list in the place of an object"),
        ({"name": "a"}, "count is missing"),
        ({"name": "a", "count": 1, "more": 1}, "'more' is not known"),
        ({"name": "a", "count": True}, "count is true"),
        ({"name": "a", "count": 1.5}, "count is 1.5"),
        ({"name": None, "count": 1}, "name is null"),
        ({"name": "a", "count": 1, "parts": {"x": "1"}}, "parts is"),
        ({"name": "a", "count": 1, "notes": [1]}, "notes is"),
    ],
)
def test_a_record_of_other_types_is_damaged(value, fault):
    with pytest.raises(ValueError, match=re.escape(fault)) as raised:
        as_record(Facts, value, place="here line 3", what=WHAT)
    assert str(raised.value).startswith(f"here line 3 is damaged ({fault}")
    assert str(raised.value).endswith(WHAT)
