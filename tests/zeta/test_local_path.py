"""Outputs lie where their names say, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from zeta.files import local_path


@pytest.mark.parametrize(
    "text", ["s3://bucket/run", "s3:/bucket/run", "GS://b/r", "file:///tmp/x", "hdfs:/x"]
)
def test_a_url_is_no_output(text):
    for given in (text, Path(text)):  # pathlib makes one slash of two
        with pytest.raises(ValueError, match=r"OUT is .* a URL"):
            local_path(given, "OUT")


@pytest.mark.parametrize("text", ["$SCRATCH/run", "${SCRATCH}/run", "/data/$USER", "a-$x"])
def test_a_variable_that_no_shell_expanded_is_no_output(text):
    with pytest.raises(ValueError, match="is not expanded here"):
        local_path(text, "OUT")


@pytest.mark.parametrize("text", ["c:relative", "a:b/c", "100%/x", "cost$/x"])
def test_odd_names_of_local_paths_are_taken_as_they_are(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_path(text, "OUT") == Path(text)


def test_the_home_folder_is_expanded_and_an_unknown_one_refused(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/me")
    assert local_path("~/a", "OUT") == Path("/home/of/me/a")
    with pytest.raises(ValueError, match="the home folder of ~no-such-user is not known"):
        local_path("~no-such-user/a", "OUT")


def test_names_that_no_file_system_takes_and_links_to_themselves_are_refused(tmp_path):
    with pytest.raises(ValueError, match="OUT has a name of 300 bytes in it"):
        local_path("x" * 300, "OUT")
    with pytest.raises(ValueError, match="OUT has a name of 256 bytes in it"):
        local_path(tmp_path / ("\u96ea" * 85 + "x") / "run", "OUT")
    assert local_path("x" * 255, "OUT").name == "x" * 255
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (loop, loop / "run"):
        with pytest.raises(ValueError, match="a link that leads to itself"):
            local_path(path, "OUT")


def test_an_empty_path_is_not_the_current_folder():
    with pytest.raises(ValueError, match="OUT is empty"):
        local_path("", "OUT")
