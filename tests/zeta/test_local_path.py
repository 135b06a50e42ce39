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
