"""A DeepSpeed that lacks what zeta relies on is refused in one sentence, before the first step."""

import json
from types import SimpleNamespace

import deepspeed
import pytest
import torch

from zeta.exit_codes import RunError
from zeta.run import requirements as installed
from zeta.zero import requirements
from zeta.zero.requirements import check_engine, check_library


def test_the_installed_library_has_all_names():
    check_library.__wrapped__()


def test_a_library_of_another_version_is_refused_though_it_has_all_names(monkeypatch):
    monkeypatch.setattr(installed.metadata, "version", lambda name: "0.20.0")
    with pytest.raises(RunError, match=r"deepspeed is installed as 0\.20\.0, and zeta supports"):
        check_library.__wrapped__()


@pytest.mark.parametrize("name", ["GatheredParameters", "Init"])
def test_a_library_without_a_name_is_refused_with_its_version_and_the_fix(monkeypatch, name):
    monkeypatch.delattr(deepspeed.zero, name)
    monkeypatch.setattr(deepspeed, "__version__", "0.19.30")
    with pytest.raises(RunError) as refused:
        check_library.__wrapped__()
    assert str(refused.value) == (
        f"deepspeed 0.19.30 is installed, which lacks deepspeed.zero.{name} that zeta relies on: "
        "pip install 'deepspeed>=0.19.8,<0.20'"
    )


def made_engine(stage, without=""):
    """An engine that has what zeta needs at a stage, but for one attribute."""
    module = torch.nn.Linear(2, 2)
    for parameter in module.parameters():
        for name in requirements._PARAMETER_OF_STAGE[stage]:
            setattr(parameter, name, None)
    engine = SimpleNamespace(module=module)
    for path in requirements._ENGINE_OF_STAGE[stage]:
        owner = engine
        if path == without or path == "module":
            continue
        *parts, last = path.split(".")
        for part in parts:
            if not isinstance(getattr(owner, part, None), SimpleNamespace):
                setattr(owner, part, SimpleNamespace())
            owner = getattr(owner, part)
        if not hasattr(owner, last):
            setattr(owner, last, SimpleNamespace())
    return engine


@pytest.mark.parametrize(
    ("stage", "missing"),
    [
        (0, "set_gradient_accumulation_boundary"),
        (1, "optimizer.micro_step_id"),
        (2, "optimizer.averaged_gradients"),
        (3, "optimizer.fp16_partitioned_groups_flat"),
        (3, "checkpoint_engine"),
    ],
)
def test_an_engine_without_an_attribute_is_refused_by_its_name(stage, missing):
    check_engine(made_engine(stage), stage)
    with pytest.raises(RunError, match=rf"lacks engine\.{missing} that zeta relies on: pip inst"):
        check_engine(made_engine(stage, without=missing), stage)


def test_parameters_without_their_map_are_refused_by_its_name():
    engine = made_engine(2)
    engine.module.bias._hp_mapping = SimpleNamespace(param_group_index=0)
    with pytest.raises(RunError, match=r"lacks parameter\._hp_mapping\.hp_fragment_address\.start"):
        check_engine(engine, 2)


@pytest.mark.slow
def test_another_layout_of_weights_is_refused_on_every_rank(ranks, tmp_path):
    out = tmp_path / "report.json"
    ranks.run("tests.zeta.engine_jobs.other_layout", 2, {"out": str(out)})
    for stage, messages in json.loads(out.read_text()).items():
        assert len(set(messages)) == 1, stage
        assert "fp32 partitions of" in messages[0], stage
        assert "pip install" in messages[0], stage
