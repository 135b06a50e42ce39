"""The names of a run directory's files, and what they tell of a folder."""

import pytest

from zeta.run.directory import Entry, RunDir


def test_an_entry_is_a_name_of_the_class_and_a_path_of_a_directory(tmp_path):
    assert isinstance(RunDir.config, Entry)
    assert RunDir(tmp_path).config == tmp_path / RunDir.config.name


def test_no_two_entries_share_a_name():
    names = [entry.name for entry in vars(RunDir).values() if isinstance(entry, Entry)]
    assert len(names) == len(set(names)) > 25


@pytest.mark.parametrize(
    "name", ["logs", "owners", "STOP", "demo.json", ".config.yaml.71-0a9f3c5e.tmp"]
)
def test_what_launchers_recipes_and_killed_runs_leave_is_not_foreign(tmp_path, name):
    (tmp_path / name).mkdir()
    assert RunDir(tmp_path).foreign_names() == []


def test_what_else_lies_there_is_foreign(tmp_path):
    for name in ("thesis.tex", "logs", "FINISHED", ".bashrc"):
        (tmp_path / name).touch()
    assert RunDir(tmp_path).foreign_names() == [".bashrc", "FINISHED", "thesis.tex"]
    assert RunDir(tmp_path / "missing").foreign_names() == []


def test_a_folder_is_a_run_directory_once_a_run_or_its_launcher_wrote_there(tmp_path):
    (tmp_path / "STOP").touch()
    assert not RunDir(tmp_path).is_marked()
    RunDir(tmp_path).owners.mkdir()
    assert RunDir(tmp_path).is_marked()
