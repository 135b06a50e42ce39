"""The shipped files are found in a checkout and in an installed package alike."""

from __future__ import annotations

from pathlib import Path

from launch import shipped

CHECKOUT = Path(__file__).parents[2]


def test_a_checkout_ships_its_own_folders():
    assert shipped.configs_root() == CHECKOUT / "configs"
    assert shipped.slurm_root() == CHECKOUT / "slurm"


def test_an_installed_package_ships_its_copy(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "launch"
    (package / "_shipped" / "configs").mkdir(parents=True)
    (package / "_shipped" / "configs" / "only.yaml").touch()
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    assert shipped.recipe_names() == ["only"]
