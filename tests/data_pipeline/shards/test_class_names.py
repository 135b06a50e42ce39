"""A class map that somebody wrote is read within limits, and its faults are one line."""

from __future__ import annotations

import pytest

from data_pipeline.shards.manifest_files import read_class_names


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b"\xff\xfe",
        b"",
        b'{"a": 0}',
        b"[1, 2]",
        b'["a", "a"]',
        b"[]",
        b'["\\ud800"]',
    ],
)
def test_a_damaged_class_map_is_one_line_that_names_the_file(tmp_path, content):
    (tmp_path / "classes.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"classes\.json") as error:
        read_class_names(tmp_path)
    assert "\n" not in str(error.value)


def test_names_in_any_script_are_read(tmp_path):
    (tmp_path / "classes.json").write_text('["caf\u00e9", "\u96ea", "0"]', encoding="utf-8")
    assert read_class_names(tmp_path) == ("caf\u00e9", "\u96ea", "0")
    assert read_class_names(tmp_path / "none") is None
