"""What `make` says and refuses before anything is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    settings = [f"{name}={value}" for name, value in variables.items()]
    # `make test-oldest` and the like hand their own variables on to every make below them.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments, *settings],
        cwd=folder,
        env=outside,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )


@pytest.fixture
def clone(tmp_path) -> Path:
    (tmp_path / "tests").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "tests/constraints-oldest.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def write_program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return path


def test_make_alone_says_what_there_is(clone):
    result = make(clone)
    assert result.returncode == 0
    for target in ("make demo", "make test", "make test-fast", "make test-gpu", "PYTHON="):
        assert target in result.stdout


@pytest.mark.parametrize("target", ["demo", "test", "test-fast", "test-gpu"])
def test_an_old_python_is_refused_by_version_before_anything_is_made(clone, target):
    old = write_program(
        clone / "python3.9", 'case "$1" in -V) echo Python 3.9.2;; *) exit 1;; esac\n'
    )
    result = make(clone, target, PYTHON=str(old))
    assert result.returncode != 0
    assert "zeta needs Python 3.11 or newer" in result.stdout
    assert "Python 3.9.2" in result.stdout
    assert not (clone / ".venv").exists()


def test_no_python_at_all_is_said(clone):
    result = make(clone, "demo", PYTHON="no-such-python")
    assert result.returncode != 0
    assert "PYTHON=/path/to/python3.11" in result.stdout


def test_the_oldest_versions_have_a_venv_of_their_own_on_the_python_that_is_named(clone):
    result = make(clone, "--dry-run", "test-oldest", PYTHON=sys.executable)
    assert "-m pip install -c tests/constraints-oldest.txt" in result.stdout
    assert f"{sys.executable} -m venv --clear .venv-oldest" in result.stdout
    assert "-m pytest -m 'not slow and not slurm and not gpu'" in result.stdout
    assert "-c constraints.txt" not in result.stdout


def test_a_newer_python_that_is_not_here_is_said_and_none_at_all_fails(clone):
    result = make(clone, "test-pythons", NEWER_PYTHONS="no-such-python")
    assert result.returncode != 0
    assert "NOT RUN: no no-such-python on this machine." in result.stdout


@pytest.mark.slow
def test_the_space_for_torch_is_announced_and_checked_before_it_is_installed(clone):
    result = make(clone, "demo", PYTHON=sys.executable, TORCH_GB="99999999")
    assert result.returncode != 0
    assert "takes about 99999999 GB of disk" in result.stdout
    assert "Free here:" in result.stdout
    assert "Not enough disk" in result.stdout
    assert "pip install" not in result.stdout
    installed = subprocess.run(
        [clone / ".venv/bin/python", "-m", "pip", "list"], capture_output=True, text=True
    )
    assert "torch" not in installed.stdout


def test_the_size_that_is_announced_is_six_gigabytes_unless_the_environment_says_otherwise(clone):
    for environment, size in (({}, "6"), ({"TORCH_GB": "2"}, "2")):
        result = subprocess.run(
            ["make", "--dry-run", "check-disk"],
            cwd=clone,
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
        )
        assert f"takes about {size} GB of disk" in result.stdout


def test_pip_is_called_with_the_constraints_and_nothing_that_overrides_its_settings(clone):
    result = make(clone, "--dry-run", "demo", "test", PYTHON=sys.executable)
    commands = [line for line in result.stdout.splitlines() if "pip install" in line]
    assert len(commands) == 2
    for command in commands:
        assert "-m pip install -c constraints.txt -e" in command
        assert "index" not in command


def test_nothing_is_reinstalled_until_a_dependency_changes(clone):
    write_program(
        clone / ".venv/bin/python", f'echo "$@" >> {clone}/calls\nexec {sys.executable} "$@"\n'
    )
    for name in (".installed", ".installed-test"):
        (clone / ".venv" / name).touch()
    assert "pip install" not in make(clone, "--dry-run", "test-fast").stdout
    subprocess.run(["touch", "-d", "+1 minute", clone / "pyproject.toml"], check=True)
    assert "pip install" in make(clone, "--dry-run", "test-fast").stdout


@pytest.mark.slow
def test_gpu_tests_are_not_said_to_pass_where_there_is_no_gpu(clone):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    write_program(clone / ".venv/bin/python", f'exec {sys.executable} "$@"\n')
    for name in (".installed", ".installed-test"):
        (clone / ".venv" / name).touch()
    result = make(clone, "test-gpu")
    assert result.returncode != 0
    assert "NOT RUN: this machine has no CUDA device" in result.stdout


def test_without_debian_and_root_the_slurm_tests_are_left_out_with_the_reason(clone):
    # A PATH with make's shell and the core tools, but neither Slurm nor apt-get
    tools = clone / "tools"
    tools.mkdir()
    for name in ("sh", "id", "echo", "tail"):
        (tools / name).symlink_to(shutil.which(name))
    hidden = {"DEBIAN_TOOLS": "no-such-tool", "PATH": str(tools)}
    program = shutil.which("make")
    settings = [f"{name}={value}" for name, value in hidden.items()]
    result = subprocess.run(
        [program, "debian-tools", *settings], cwd=clone, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "no-such-tool" in result.stdout
    assert "will be skipped" in result.stdout


def test_ci_calls_make_test_and_nothing_else():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["exec make test"]
