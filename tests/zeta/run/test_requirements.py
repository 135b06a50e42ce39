"""Other versions of torch and DeepSpeed are refused at the start, by name and with the fix."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib

import pytest

from launch.cli import entry_point
from tests.zeta.training import ROOT
from zeta.exit_codes import ExitCode
from zeta.run import requirements
from zeta.run.requirements import DEEPSPEED, TORCH, UnsupportedVersionError, check_installed


@pytest.fixture
def pretend(monkeypatch):
    """Let a library have another version, or none."""
    real = requirements.metadata.version

    def give(name, version):
        def version_of(asked):
            if asked != name:
                return real(asked)
            if version is None:
                raise requirements.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(requirements.metadata, "version", version_of)

    return give


def test_the_project_declares_the_versions_that_are_checked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {TORCH, DEEPSPEED} <= set(project["dependencies"])


def test_the_versions_that_are_installed_here_are_supported():
    check_installed(TORCH, DEEPSPEED)


@pytest.mark.parametrize(
    ("requirement", "version"),
    [
        (TORCH, "2.10.0"),
        (TORCH, "2.10.0a0+b558c986e8.nv25.12"),  # a container's build
        (TORCH, "2.14.1+cu130"),
        (TORCH, "2.100.0"),
        (DEEPSPEED, "0.19.8+unknown"),
    ],
)
def test_a_supported_version_passes_whatever_its_build(pretend, requirement, version):
    pretend(requirement.partition(">")[0], version)
    check_installed(requirement)


@pytest.mark.parametrize(
    ("requirement", "version", "message"),
    [
        (
            TORCH,
            "2.9.1+cu128",
            "torch is installed as 2.9.1+cu128, and zeta supports >=2.10: "
            "pip install 'torch>=2.10'",
        ),
        (
            DEEPSPEED,
            "0.19.7",
            "deepspeed is installed as 0.19.7, and zeta supports >=0.19.8,<0.20: "
            "pip install 'deepspeed>=0.19.8,<0.20'",
        ),
        (
            DEEPSPEED,
            "0.20.0",
            "deepspeed is installed as 0.20.0, and zeta supports >=0.19.8,<0.20: "
            "pip install 'deepspeed>=0.19.8,<0.20'",
        ),
        (
            DEEPSPEED,
            None,
            "deepspeed is not installed, and zeta supports >=0.19.8,<0.20: "
            "pip install 'deepspeed>=0.19.8,<0.20'",
        ),
    ],
)
def test_another_version_is_refused_with_what_is_there_what_is_supported_and_the_fix(
    pretend, monkeypatch, requirement, version, message
):
    pretend(requirement.partition(">")[0], version)
    monkeypatch.setattr("zeta.run.requirements.find_spec", lambda name: None)
    with pytest.raises(UnsupportedVersionError) as refused:
        check_installed(requirement)
    assert str(refused.value) == message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zeta.models", "zeta.vision"])
def test_the_import_of_a_model_refuses_another_torch(name):
    code = f"""
from importlib import metadata
real = metadata.version
metadata.version = lambda name: "2.9.1" if name == "torch" else real(name)
try:
    import {name}
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == (
        "torch is installed as 2.9.1, and zeta supports >=2.10: pip install 'torch>=2.10'\n"
    ), done.stderr


@pytest.mark.parametrize("command", ["train", "train --dry-run", "launch local --nproc 2"])
def test_training_refuses_another_deepspeed_before_it_looks_for_data(
    pretend, capsys, tmp_path, command
):
    pretend("deepspeed", "0.20.0")
    shards, run_dir = json.dumps(str(tmp_path / "none")), tmp_path / "run"
    words = ["navit_b16_classification", f"data.shards={shards}", f"run.dir={run_dir}"]
    assert entry_point([*command.split(), *words]) == ExitCode.NEVER_RESTART
    assert capsys.readouterr().err == (
        "zeta: error: deepspeed is installed as 0.20.0, and zeta supports >=0.19.8,<0.20: "
        "pip install 'deepspeed>=0.19.8,<0.20'\n"
    )
    assert not run_dir.exists()
