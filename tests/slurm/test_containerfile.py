"""slurm/Containerfile, as far as it can be checked without building it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the file, in order, each on one line."""
    text = (ROOT / "slurm" / "Containerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word, rest.strip()) for word, _, rest in (s.partition(" ") for s in joined.split("\n"))
    ]


def of(word: str) -> list[str]:
    return [rest for each, rest in instructions() if each == word]


def copied() -> list[tuple[Path, str]]:
    """Return each file or folder that is copied into the image, and where to."""
    found = []
    for line in of("COPY"):
        *sources, target = line.split()
        found += [(ROOT / source, target) for source in sources]
    return found


def test_the_base_is_an_argument_without_a_registry():
    assert of("FROM") == ["${BASE}"]
    (base,) = [line for line in of("ARG") if line.startswith("BASE=")]
    assert instructions()[0] == ("ARG", base)
    first = base.removeprefix("BASE=").partition("/")[0]
    assert "." not in first.partition(":")[0]  # a host has a dot, or a port before a slash
    assert "/" not in base


def test_its_commands_are_shell():
    runs = of("RUN")
    assert len(runs) == 3
    for command in runs:
        parsed = subprocess.run(["sh", "-n"], input=command, text=True, capture_output=True)
        assert parsed.returncode == 0, parsed.stderr


def test_python_packages_have_the_versions_of_the_constraints_and_extras_that_exist():
    (install,) = [command for command in of("RUN") if "pip install" in command]
    words = shlex.split(install)
    assert words[words.index("-c") + 1] == "${CONSTRAINTS}"
    defaults = dict(line.partition("=")[::2] for line in of("ARG") if "=" in line)
    assert (ROOT / "constraints.txt", "/opt/zeta/") in copied()
    assert defaults["CONSTRAINTS"] == "/opt/zeta/constraints.txt"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(defaults["EXTRAS"].split(",")) <= set(project["optional-dependencies"])
    for name, default in defaults.items():
        assert f"${{{name}}}" in " ".join(of("RUN") + of("FROM")), (name, default)


@pytest.mark.slow
def test_the_commands_of_zeta_that_it_tries_exist():
    (tried,) = [command for command in of("RUN") if command.startswith("zeta ")]
    assert re.findall(r"zeta ([\w-]+)", tried) == ["--version", "config"]
    code = "from launch.cli import entry_point; raise SystemExit(entry_point())"
    for words in (["--version"], ["config", "first_run"]):
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_it_copies_is_enough_for_the_wheel(tmp_path: Path):
    for source, target in copied():
        place = tmp_path / Path(target).relative_to("/opt/zeta")
        if source.is_dir():
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, place / source.name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", tmp_path]
    subprocess.run([*command, "--wheel-dir", tmp_path / "out"], check=True)
    assert list((tmp_path / "out").glob("zeta-*.whl"))
