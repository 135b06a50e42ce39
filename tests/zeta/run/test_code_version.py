"""Which commit the running source is of, and that nobody else's is taken for it."""

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import zeta
from zeta.run.code_version import code_version, note_code

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")


def _git(folder, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def package(tmp_path):
    """A package that is tracked in a repository of one commit."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-qm", "first")
    return package


def test_commit_and_changes_of_the_source_tree_are_told(package):
    commit = _git(package, "rev-parse", "HEAD")
    assert code_version(package)["commit"] == commit
    assert code_version(package)["dirty"] is False
    (package / "untracked.txt").write_text("a note")
    assert code_version(package)["dirty"] is False
    (package / "__init__.py").write_text("x = 1\n")
    assert code_version(package) | {"package": None} == {
        "package": None,
        "commit": commit,
        "dirty": True,
    }


def test_a_copy_that_is_installed_inside_another_repository_has_no_commit(package, tmp_path):
    installed = tmp_path / "site-packages" / "zeta"
    shutil.copytree(Path(zeta.__file__).parent, installed)
    version = code_version(installed)
    assert (version["commit"], version["dirty"]) == (None, None)


def test_without_git_or_a_repository_nothing_is_known(package, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version(package)["commit"] is None


def test_code_is_noted_with_its_changes_but_without_untracked_files(package, tmp_path):
    (package / "untracked.txt").write_text("a secret")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    _git(tmp_path, "add", "latin")
    (package / "__init__.py").write_text("x = 1\n \n")
    path = tmp_path / "code.diff"
    note_code(path, package)
    text = path.read_text()
    assert text.startswith("zeta ")
    assert f"commit {_git(package, 'rev-parse', 'HEAD')}, with changes\n" in text
    assert "+x = 1\n+ \n" in text
    assert "secret" not in text


def test_code_is_noted_once_for_as_long_as_it_stays_the_same(package, tmp_path):
    path = tmp_path / "code.diff"
    note_code(path, package)
    once = path.read_text()
    assert once.count("\n") == 1
    assert once.endswith("unchanged\n")
    note_code(path, package)
    assert path.read_text() == once
    (package / "__init__.py").write_text("x = 1\n")
    note_code(path, package)
    assert path.read_text().startswith(once)
    assert "+x = 1" in path.read_text()


def test_a_large_change_is_cut_short(package, tmp_path):
    (package / "__init__.py").write_text("x = 1\n" * 500_000)
    path = tmp_path / "code.diff"
    note_code(path, package)
    assert path.stat().st_size < 1_001_000
    assert "cut short" in path.read_text().splitlines()[-1]


def test_without_git_only_the_version_is_noted(package, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    note_code(tmp_path / "code.diff", package)
    assert (tmp_path / "code.diff").read_text().endswith("commit unknown, changes unknown\n")


def test_the_version_of_the_installed_package_is_told():
    project = tomllib.loads((Path(zeta.__file__).parents[1] / "pyproject.toml").read_text())
    assert code_version()["package"] == project["project"]["version"]
