"""The quality gates: style, types, import directions, size of files, and what the wheel holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("zeta", "data_pipeline", "launch")
MAX_LINES = 500


def tool(name: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a tool of this environment."""
    program = Path(sys.executable).with_name(name)
    return subprocess.run(
        [program, *arguments], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def tracked_files() -> list[Path]:
    """Return the files of the repository; without git (an sdist), the files of its folders."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [
            ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()
        ]
    folders = (*PACKAGES, "configs", "slurm", "tests")
    return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]


def test_ruff_finds_nothing():
    result = tool("ruff", "check")
    assert result.returncode == 0, result.stdout


def test_files_are_formatted():
    result = tool("ruff", "format", "--check")
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_types_are_strict_and_right():
    result = tool("mypy", "--strict", *(option for name in PACKAGES for option in ("-p", name)))
    assert result.returncode == 0, result.stdout


def test_imports_go_from_launch_over_data_pipeline_to_zeta():
    result = tool("lint-imports")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("zeta.planted", "data_pipeline.config"),
        ("zeta.planted", "launch.cli"),
        ("data_pipeline.planted", "launch.cli"),
        ("data_pipeline.planted", "zeta.train.trainer"),
        ("zeta.models.planted", "zeta.train.engine"),  # up a floor
        ("zeta.tracking.planted", "zeta.zero.state"),  # to the other room of its floor
        ("launch.config.planted", "launch.run.local"),
        ("zeta.train.planted", "deepspeed"),  # past the protocol of zeta.zero
    ],
)
def test_an_import_against_the_arrows_would_be_found(tmp_path, module, imported):
    assert f"{module} -> {imported}" in lint_with(tmp_path, {module: f"import {imported}\n"})


def test_a_circle_of_imports_would_be_found(tmp_path):
    planted = {
        "zeta.run.planted": "import zeta.run.heartbeat\n",
        "zeta.run.heartbeat": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import zeta.run.planted\n"
        ),
    }
    assert "No cycles are allowed in zeta.run" in lint_with(tmp_path, planted)


def lint_with(folder: Path, planted: dict[str, str]) -> str:
    """Return what lint-imports says of a copy of the packages with some modules replaced."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for module, source in planted.items():
        (folder / module.replace(".", "/")).with_suffix(".py").write_text(source)
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    return result.stdout


def test_no_source_file_is_longer_than_500_lines():
    long = {
        str(path.relative_to(ROOT)): count
        for path in tracked_files()
        if path.suffix in (".py", ".yaml", ".sbatch")
        and (count := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long


def test_no_file_names_a_package_index():
    host = re.compile(r"https?://[^\s'\"]*(?:pypi|pythonhosted|download\.pytorch)[^\s'\"]*")
    found = {
        str(path.relative_to(ROOT)): match.group()
        for path in tracked_files()
        if path != Path(__file__) and (match := host.search(path.read_text(errors="ignore")))
    }
    assert not found


def test_nothing_is_left_to_do_or_silenced():
    mark = re.compile(r"\b(TODO|FIXME|XXX)\b|except Exception:\s*pass|except:\s")
    found = {
        str(path.relative_to(ROOT)): match.group()
        for path in tracked_files()
        if path.suffix == ".py"
        and path != Path(__file__)
        and (match := mark.search(path.read_text()))
    }
    assert not found


def test_every_direct_dependency_is_pinned_in_the_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in wanted}
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert names <= {name.lower() for name in pins}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", out, ROOT],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert built.returncode == 0, built.stdout
    return next(out.glob("zeta-*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_what_the_repository_holds(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("configs", "slurm"):
        shipped = [path for path in tracked_files() if path.is_relative_to(ROOT / folder)]
        assert shipped
        assert {f"launch/_shipped/{path.relative_to(ROOT)}" for path in shipped} <= names
    modules = [p for p in tracked_files() if p.relative_to(ROOT).parts[0] in PACKAGES]
    assert {str(path.relative_to(ROOT)) for path in modules} <= names
    assert not [name for name in names if name.startswith("tests/")]


@pytest.mark.slow
def test_zeta_works_from_the_installed_wheel_away_from_the_repository(wheel, tmp_path):
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", site, wheel],
        check=True,
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "import launch, launch.cli\n"
        "assert launch.__file__.startswith(sys.path[0]), launch.__file__\n"
        "sys.exit(launch.cli.entry_point())\n"
    )
    settings = ["navit_b16_classification", "data.shards=x", "run.dir=over there"]
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, site, "launch", "check", *settings],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "over there\n"
    assert (site / "bin" / "zeta").exists()
