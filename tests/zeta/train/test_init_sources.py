"""Weights to begin at are refused by name, before anything starts."""

import json

import pytest

from tests.zeta.training import tiny_navit
from zeta.exit_codes import RunError
from zeta.models.parameters import parameter_shapes
from zeta.train.init_sources import check_initial_weights, for_model, open_weights


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
    there = {"image.head.weight": 1, "image.norm.gamma": 2, "text.head.weight": 3}
    assert for_model(there, ["norm.gamma", "head.weight"]) == {"norm.gamma": 2}
    assert for_model(there, there) == there


def test_what_holds_no_weights_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"train\.init_from cannot be read: .* is not a folder"):
        check_initial_weights(tiny_navit(), str(tmp_path / "absent"))
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    with pytest.raises(RunError, match=r"no whole checkpoint in .* manifest\.json is missing"):
        check_initial_weights(tiny_navit(), str(tmp_path))
