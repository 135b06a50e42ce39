"""Weights to begin at are refused by name, before anything starts."""

import json
from dataclasses import replace

import pytest

from tests.zeta.models.published.encoders import encoder
from tests.zeta.models.published.test_timm_vit import FREE
from tests.zeta.models.published.test_timm_vit import saved as saved_timm
from tests.zeta.small_models import small
from tests.zeta.training import tiny_navit
from zeta.exit_codes import RunError
from zeta.export.saving import save_pretrained
from zeta.models.config import ModelConfig
from zeta.models.parameters import parameter_shapes
from zeta.models.sources import read_config
from zeta.objectives import build_for_objective
from zeta.objectives.config import LejepaConfig, ObjectiveConfig, TextTowerConfig
from zeta.train.init_sources import (
    check_initial_weights,
    for_model,
    head_to_leave,
    open_weights,
    parts_to_leave,
)


def test_a_folder_that_holds_no_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no weights that zeta can read: give a run directory"):
        open_weights(tmp_path, {})
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        open_weights(tmp_path, {})
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "naflexvit"}))
    with pytest.raises(ValueError, match=r"lacks model.safetensors"):
        open_weights(tmp_path, {})


@pytest.mark.parametrize("inside", ["", "checkpoints/step_00000004"])
def test_a_checkpoint_of_another_model_is_refused_by_its_list_of_parameters(tmp_path, inside):
    directory = tmp_path / "checkpoints" / "step_00000004"
    directory.mkdir(parents=True)
    state = {"parameters": parameter_shapes(tiny_navit(num_classes=7))}
    (directory / "trainer.json").write_text(json.dumps(state))
    check_initial_weights(tiny_navit(), str(tmp_path / inside))  # a head of its own is no fault
    with pytest.raises(RunError, match=r"train\.init_from .* of another model: attn_pool\.kv"):
        check_initial_weights(tiny_navit(dim=24), str(tmp_path / inside))


def test_a_classifier_may_begin_at_the_image_encoder_of_an_image_text_run(tmp_path):
    saved = {f"image.{n}": shape for n, shape in parameter_shapes(tiny_navit()).items()}
    saved |= {"text.head.weight": [5, 16], "logits.scale": []}
    (tmp_path / "trainer.json").write_text(json.dumps({"parameters": saved}))
    check_initial_weights(tiny_navit(num_classes=7), str(tmp_path))
    with pytest.raises(RunError, match=r"of another model: attn_pool\.kv"):
        check_initial_weights(tiny_navit(dim=24), str(tmp_path))


def test_of_an_image_text_run_the_head_is_not_taken():
    there = {"image.head.weight": 1, "image.embeds.proj.weight": 2, "text.head.weight": 3}
    names = ["embeds.proj.weight", "head.weight"]
    assert for_model(there, names) == {"embeds.proj.weight": 2}
    assert for_model(there, there) == there
    of_views = ["image.head.weight", "image.embeds.proj.weight", "projector.0.weight"]
    assert for_model(there, of_views) == {"image.embeds.proj.weight": 2}


TEXT = {"dim": 16, "heads": 2, "mlp_dim": 16, "vocab_size": 9, "max_tokens": 8}
OBJECTIVES = {
    "lejepa": ObjectiveConfig(kind="lejepa", lejepa=LejepaConfig(hidden=12, dim=6)),
    "siglip": ObjectiveConfig(kind="siglip", text=TextTowerConfig(**TEXT, depth=1)),
}


@pytest.fixture(params=["export", "transformers", "timm", "run"])
def source(request, tmp_path):
    """A path with weights of an encoder, and the options of its model."""
    path = tmp_path / "theirs"
    if request.param == "transformers":
        encoder("dinov3").save_pretrained(path)
    elif request.param == "timm":
        saved_timm(path, "vit_base_patch16_224", **FREE)
    elif request.param == "export":
        model, arguments = small()
        save_pretrained(path, model.state_dict(), arguments, {})
    else:
        model, arguments = small()
        path.mkdir()
        state = {"parameters": parameter_shapes(model)}
        (path / "trainer.json").write_text(json.dumps(state))
        return path, arguments
    return path, read_config(path)["model"]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_model_of_several_parts_may_begin_at_an_encoder_alone(source, kind):
    path, arguments = source
    options = ModelConfig(**{**arguments, "num_classes": 1})
    model = build_for_objective(options, OBJECTIVES[kind], seed=0)
    check_initial_weights(model, str(path))
    wider = {"dim": 12, "dim_head": None, "heads": 3, "num_classes": 1}
    other = build_for_objective(ModelConfig(**{**arguments, **wider}), OBJECTIVES[kind], seed=0)
    with pytest.raises(RunError, match=r"of another model: image\..* there and .* in this config"):
        check_initial_weights(other, str(path))
    if (path / "trainer.json").exists():
        return
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    opened = open_weights(path, wanted)
    anew = parts_to_leave(wanted, opened.tensors)
    assert {*anew, *opened.tensors} == set(wanted)
    assert {name.partition(".")[0] for name in anew} == {name.partition(".")[0] for name in wanted}
    assert all(n.startswith("image.head.") for n in anew if n.startswith("image."))


def test_weights_of_one_kind_of_run_are_compared_whole():
    """A text tower of another depth is refused, and not left behind as if it were another part."""
    deep = replace(OBJECTIVES["siglip"], text=TextTowerConfig(**TEXT, depth=2))
    _, arguments = small()
    options = ModelConfig(**arguments)
    there, wanted = (
        parameter_shapes(build_for_objective(options, objective, seed=0))
        for objective in (deep, OBJECTIVES["siglip"])
    )
    assert parts_to_leave(wanted, for_model(there, wanted)) == []
    with pytest.raises(RunError, match=r"of another model: text\.blocks\.1"):
        head_to_leave(wanted, for_model(there, wanted), "path")


def test_what_holds_no_weights_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"train\.init_from cannot be read: .* is not a folder"):
        check_initial_weights(tiny_navit(), str(tmp_path / "absent"))
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    with pytest.raises(RunError, match=r"no whole checkpoint in .* manifest\.json is missing"):
        check_initial_weights(tiny_navit(), str(tmp_path))
