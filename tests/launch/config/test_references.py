"""A config refers to its own keys only: nothing of the environment gets into it."""

from __future__ import annotations

import pytest

from launch.config.load import load_config, to_yaml

SHARDS = "data.shards=shards/train"
SECRET = "key-of-somebody"
FIELDS = (
    "run.name",
    "run.dir",
    "data.shards",
    "data.cache_dir",
    "data.text.tokenizer",
    "model.preset",
    "objective.kind",
    "optim.kind",
    "train.init_from",
    "tracker.wandb.project",
    "tracker.wandb.group",
    "tracker.wandb.job_type",
    "cluster.account",
    "cluster.container.image",
    "cluster.environment.A",
)
FORMS = (
    "${oc.env:ZETA_TEST_KEY}",
    "${oc.env:NO_SUCH_VARIABLE,${oc.env:ZETA_TEST_KEY}}",
    "${oc.decode:${oc.env:ZETA_TEST_KEY}}",
    "${ oc.env: ZETA_TEST_KEY }",
    "${oc.select:run.${oc.env:ZETA_TEST_KEY}}",
    "${run.${oc.env:ZETA_TEST_KEY}}",
    "x${oc.env:ZETA_TEST_KEY}y",
    "\\\\${oc.env:ZETA_TEST_KEY}",
    "${env:ZETA_TEST_KEY}",
    "${ZETA_TEST_KEY}",
    "${.name}",
)


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("ZETA_TEST_KEY", SECRET)


def as_yaml(key, value):
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["on the command line", "in a recipe"])
def test_functions_and_variables_are_refused_by_key_and_nothing_of_them_is_said(
    tmp_path, form, place
):
    recipe = tmp_path / "mine.yaml"
    quoted = form.replace("\\", "\\\\")
    text = f'tracker: {{wandb: {{group: "{quoted}"}}}}\n' if place == "in a recipe" else ""
    recipe.write_text(f"include: [demo]\n{text}")
    settings = [] if text else [f"tracker.wandb.group={form}"]
    with pytest.raises(ValueError, match=r"tracker\.wandb\.group holds \$\{") as refused:
        load_config(str(recipe), [SHARDS, *settings])
    assert SECRET not in str(refused.value)
    assert (str(recipe) if text else place) in str(refused.value)


@pytest.mark.parametrize("key", FIELDS)
def test_every_text_field_refuses_variables(key):
    with pytest.raises(ValueError, match="only keys of the config can be referred to"):
        load_config("demo", [SHARDS, f"{key}=${{oc.env:ZETA_TEST_KEY}}"])


@pytest.mark.parametrize(
    "setting",
    [
        "tracker.wandb.tags=['${oc.env:ZETA_TEST_KEY}']",
        "data.shards=[{path: '${oc.env:ZETA_TEST_KEY}', weight: 1}]",
        "optim.params={'${oc.env:ZETA_TEST_KEY}': 1}",
        "data.resolution.fit=${oc.env:ZETA_TEST_KEY}",
    ],
)
def test_lists_and_mappings_are_looked_through(setting):
    with pytest.raises(ValueError, match=r"only keys of the config") as refused:
        load_config("demo", [SHARDS, setting])
    assert SECRET not in str(refused.value)


def test_keys_of_the_config_are_still_expanded():
    config = load_config("demo", [SHARDS, "run.name=a", "tracker.wandb.group=g-${ run.name }"])
    assert (config.run.dir, config.tracker.wandb.group) == ("runs/a", "g-a")
    assert load_config("demo", [SHARDS, "cluster.account=\\${HOME}"]).cluster.account == "${HOME}"


@pytest.mark.parametrize(
    "settings",
    [
        ["run.dir=${run.dir}"],
        ["run.dir=${cluster.qos}", "cluster.qos=${run.dir}"],
        [f"cluster.account={'${run.name}' * 9}"],
        [
            f"cluster.environment.A{i}=${{cluster.environment.A{i + 1}}}"
            f"${{cluster.environment.A{i + 1}}}"
            for i in range(40)
        ],
    ],
)
def test_circles_and_growth_without_bounds_are_refused(settings):
    with pytest.raises(ValueError, match="refer"):
        load_config("demo", [SHARDS, *settings])


def test_the_shipped_recipes_hold_nothing_of_the_environment(monkeypatch):
    for name in ("USER", "NCCL_DEBUG", "HOME", "LOGNAME"):
        monkeypatch.setenv(name, SECRET)
    for name in ("navit_b16_classification", "megavit_1b"):
        assert SECRET not in to_yaml(load_config(name, [SHARDS]))
