"""Paths of the shipped files: recipes (configs/) and sbatch scripts (slurm/)."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _root(folder: str) -> Path:
    """Return the folder inside the installed package, or the one of the checkout it runs from."""
    installed = _PACKAGE / "_shipped" / folder
    return installed if installed.is_dir() else _PACKAGE.parent / folder


def configs_root() -> Path:
    """Return the folder of the shipped recipes and of the pieces that they include."""
    return _root("configs")


def slurm_root() -> Path:
    """Return the folder of the sbatch scripts."""
    return _root("slurm")


def recipe_names() -> list[str]:
    """Return the names that `zeta train NAME` accepts: the YAML files at the top of configs/."""
    return sorted(path.stem for path in configs_root().glob("*.yaml"))
