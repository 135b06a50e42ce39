"""Weights are taken by a model with the options that they were trained with, and by no other."""

import json

import pytest
import torch

from tests.zeta.models.published.encoders import encoder
from tests.zeta.models.published.test_timm_vit import FREE
from tests.zeta.models.published.test_timm_vit import saved as saved_timm
from tests.zeta.small_models import small
from zeta.distributed import RankInfo, World
from zeta.exit_codes import RunError
from zeta.export.saving import save_pretrained
from zeta.models.config import ModelConfig, build_model
from zeta.models.sources import read_config
from zeta.objectives import build_for_objective
from zeta.objectives.config import LejepaConfig, ObjectiveConfig
from zeta.train.init_from import load_initial_weights
from zeta.train.init_sources import check_initial_weights

WORLD = World(RankInfo(), torch.device("cpu"))
LEJEPA = ObjectiveConfig(kind="lejepa", lejepa=LejepaConfig(hidden=12, dim=6))


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """Set tensors without a group of processes."""
    take = "zeta.train.init_from.set_from_main"
    monkeypatch.setattr(take, lambda tensor, value, world: tensor.data.copy_(value))


@pytest.fixture(params=["timm", "vit", "dinov3", "export"])
def source(request, tmp_path):
    """The path of an encoder."""
    path = tmp_path / "theirs"
    if request.param == "timm":
        saved_timm(path, "vit_base_patch16_224", **FREE)
    elif request.param == "export":
        model, arguments = small(position="rope", qk_norm=False)
        save_pretrained(path, model.state_dict(), arguments, {})
    else:
        encoder(request.param).save_pretrained(path)
    return path


def _options(path, **changes):
    return ModelConfig(**(read_config(path)["model"] | changes))


def _both(model, path):
    """Begin at the weights in both places that do: before a run, and in it."""
    check_initial_weights(model, str(path))
    return load_initial_weights(model, str(path), WORLD)[1]


def _changes(arguments):
    heads = arguments["heads"]
    yield {"heads": 1, "dim_head": arguments["dim"]}, f"set model.heads={heads} model.dim_head="
    yield (
        {"activation": "silu"},
        "activation = 'gelu' there, 'silu' here.*set model.activation=gelu",
    )
    yield {"norm_eps": 0.01}, "set model.norm_eps=1e-"
    if arguments["position"] == "rope":
        yield {"rope_base": 3.0}, r"set model.rope_base=100.0"
        yield {"rope_coordinates": "index"}, "set model.rope_coordinates=separate"
        yield {"rope_coordinates": "index", "rope_grid": [3, 3]}, "set .* model.rope_grid=null"
    else:
        yield {"position": f"rope+{arguments['position']}"}, "set model.position=grid_bicubic"


def test_an_option_that_shapes_do_not_tell_is_refused_with_its_value(source):
    arguments = read_config(source)["model"]
    for changes, message in _changes(arguments):
        model = build_model(_options(source, **changes))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for begin in (
            lambda model: check_initial_weights(model, str(source)),
            lambda model: load_initial_weights(model, str(source), WORLD),
        ):
            with pytest.raises(RunError, match=f"weights are of another model.*{message}"):
                begin(model)
        assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_the_encoder_of_a_model_of_several_parts_is_compared_too(source):
    options = _options(source, num_classes=1, norm_eps=0.01)
    with pytest.raises(RunError, match=r"set model\.norm_eps="):
        check_initial_weights(build_for_objective(options, LEJEPA, seed=0), str(source))


def test_what_training_chooses_may_differ(source):
    changes = {"num_classes": 9, "dropout": 0.1, "stochastic_depth": 0.1}
    if read_config(source)["model"]["position"] == "rope":
        changes |= {"rope_shift": 0.1, "rope_jitter": 1.3}
    note = _both(build_model(_options(source, **changes)), source)
    assert "its positions as" not in note


def test_a_table_that_is_resized_otherwise_is_said(tmp_path):
    saved_timm(tmp_path, "vit_base_patch16_224", **FREE)
    note = _both(build_model(_options(tmp_path, position="grid_bilinear")), tmp_path)
    assert "its positions as grid_bilinear, which are grid_bicubic there (model.position=" in note


def test_what_no_file_tells_is_not_compared(tmp_path):
    saved_timm(tmp_path, "vit_base_patch16_224", **FREE)
    changes = {"heads": 4, "dim_head": 12, "norm_eps": 0.01, "activation": "silu"}
    model = build_model(_options(tmp_path, **changes))
    (tmp_path / "config.json").unlink()
    assert "there is no config.json: gelu" in _both(model, tmp_path)


def test_weights_of_the_same_shapes_that_no_navit_computes_are_refused(tmp_path):
    saved_timm(tmp_path, "vit_base_patch16_224", **FREE)
    model = build_model(_options(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"] |= {"global_pool": "avg", "fc_norm": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="are of no NaViT: global_pool is avg: NaViT pools"):
        check_initial_weights(model, str(tmp_path))
