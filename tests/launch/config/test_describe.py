"""`zeta config`: recipes in a line each, their values with documentation and source."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.config.fields import config_fields, field_docs
from launch.config.keys import leaves
from launch.config.load import ZetaConfig, compose, load_config, read_settings, to_yaml
from launch.shipped import recipe_names
from tests.launch.command_line import zeta

SHARDS = "data.shards=shards/photos"


@pytest.mark.slow
def test_the_command_lists_every_recipe_with_one_line_about_it(tmp_path: Path):
    done = zeta("config", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = dict(line.split(maxsplit=1) for line in done.stdout.split("\n\n")[0].splitlines())
    assert list(listed) == recipe_names()
    assert listed["demo"].startswith("The recipe of `zeta demo`")
    assert all(len(about) < 110 and about.endswith(".") for about in listed.values())


@pytest.mark.slow
def test_the_command_prints_each_value_with_its_meaning_and_source(tmp_path: Path):
    piece, recipe = tmp_path / "piece.yaml", tmp_path / "mine.yaml"
    piece.write_text("optim: {lr: 3e-4, warmup_steps: 7}\n")
    recipe.write_text("include: [model/navit_b16, piece]\noptim: {lr: 1e-3}\n")
    done = zeta("config", str(recipe), "train.max_steps=12", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"  lr: 0.001  # {recipe}" in lines
    assert f"  warmup_steps: 7  # {piece}" in lines
    assert "  preset: navit_b16  # configs/model/navit_b16.yaml" in lines
    assert "  max_steps: 12  # command line" in lines
    assert "  name: mine  # name of the recipe" in lines
    before = lines.index("  token_budget: 4096  # default") - 1
    assert lines[before] == f"  # {config_fields_by_key()['data.token_budget']}"


@pytest.mark.slow
def test_the_name_of_no_recipe_is_an_error_with_the_nearest_one(tmp_path: Path):
    done = zeta("config", "first_rum", cwd=tmp_path)
    assert done.returncode == 1
    assert "no config 'first_rum' (did you mean first_run?)" in done.stderr
    assert "Traceback" not in done.stderr
    assert (
        "unknown config key optim.lrr" in zeta("config", "demo", "optim.lrr=1", cwd=tmp_path).stderr
    )


@pytest.mark.slow
def test_the_command_line_loads_no_torch_before_a_command_runs():
    code = (
        "import sys, launch.cli\n"
        "launch.cli.parse_arguments(['config', 'demo'])\n"
        "sys.exit(' '.join({'torch', 'deepspeed', 'numpy', 'omegaconf'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("name", recipe_names())
def test_the_values_of_a_recipe_are_a_recipe_that_gives_the_same_config(name: str, tmp_path: Path):
    from launch.config.describe import config_yaml

    saved = tmp_path / f"{name}.yaml"
    saved.write_text(config_yaml(name))
    assert load_config(str(saved), [SHARDS]) == load_config(name, [SHARDS])
    values = dict(leaves(yaml.safe_load(saved.read_text()), ZetaConfig, "here"))
    expected = yaml.safe_load(to_yaml(compose(read_settings(name))))
    assert values.keys() == dict(leaves(expected, ZetaConfig, "there")).keys()


def config_fields_by_key() -> dict[str, str]:
    return {item.key: item.doc for item in config_fields()}


def test_every_setting_is_documented():
    assert not [key for key, doc in config_fields_by_key().items() if not doc]


def test_only_the_text_under_a_field_is_its_documentation():
    docs = field_docs(ZetaConfig)
    assert docs == {}
    from zeta.train.config import OptimConfig

    assert field_docs(OptimConfig)["lr"]
    assert "\n" not in "".join(field_docs(OptimConfig).values())
