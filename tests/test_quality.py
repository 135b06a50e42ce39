"""The layout of the source, the house rules, and the files in the wheel.

Style, types and the directions of imports are checked by `make lint`; here is tested that it would
find an import against them.
"""

from __future__ import annotations

import ast
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


def tracked_files() -> list[Path]:
    """Return the files of the repository; without git (an sdist), the files of its folders."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [
            ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()
        ]
    folders = (*PACKAGES, "configs", "slurm", "tests")
    return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]


def test_imports_go_down_the_floors_and_never_in_circles():
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
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


def folders_of_modules() -> dict[Path, list[Path]]:
    """Return the Python files of each folder of the source and the tests."""
    found: dict[Path, list[Path]] = {}
    for path in tracked_files():
        inside = path.relative_to(ROOT)
        if path.suffix == ".py" and inside.parts[0] in (*PACKAGES, "tests"):
            found.setdefault(inside.parent, []).append(path)
    return found


def test_no_folder_has_more_than_25_modules():
    counts = {folder: len(files) for folder, files in folders_of_modules().items()}
    assert not {folder: count for folder, count in counts.items() if count > 25}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_top_of_a_package_has_at_most_20_entries(package: str):
    parts = {path.relative_to(ROOT).parts for path in tracked_files()}
    entries = {part[1] for part in parts if part[0] == package}
    assert len(entries) <= 20


def test_folders_of_the_source_are_at_most_two_levels_deep():
    assert not [f for f in folders_of_modules() if f.parts[0] in PACKAGES and len(f.parts) > 3]


def test_every_folder_says_what_lives_in_it_and_what_it_may_import():
    for folder in folders_of_modules():
        if folder.parts[0] in PACKAGES:
            source = (ROOT / folder / "__init__.py").read_text()
            lives, *rest = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")
            assert lives, folder
            assert re.search(r"\b[Ii]mports?\b", " ".join(rest)), folder


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


def test_the_oldest_versions_that_are_tested_are_those_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["test"]
    oldest = dict(re.match(r"([\w-]+).*?>=([\d.]+)", text).groups() for text in declared)
    pins = re.findall(
        r"^([\w-]+)==(.+)$", (ROOT / "tests/constraints-oldest.txt").read_text(), re.M
    )
    assert {name for name, _ in pins} == set(oldest)
    for name, pin in pins:
        assert pin == oldest[name] or pin.startswith(f"{oldest[name]}."), name


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


def test_the_picture_of_the_architecture_has_every_room():
    picture = (ROOT / "docs" / "architecture.svg").read_text()
    rooms = {init.parent.name for name in PACKAGES for init in (ROOT / name).glob("*/__init__.py")}
    assert {"zero", "plan", "recipes"} <= rooms
    assert not [room for room in rooms if f">{room}</text>" not in picture]
