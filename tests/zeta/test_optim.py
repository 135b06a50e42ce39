"""Which parameters AdamW decays, and at which rate."""

import pytest
import torch
from torch import nn

from tests.zeta.training import tiny_navit
from zeta.models.config import ModelConfig, build_model
from zeta.optim import (
    build_optimizer,
    decay_group,
    optimizer_order,
    parameter_groups,
    parameter_shapes,
)
from zeta.train_config import OptimConfig


def _groups(model):
    return {name: decay_group(name, shape) for name, shape in parameter_shapes(model).items()}


def test_matrices_are_decayed_and_norms_biases_tables_and_the_latent_are_not():
    groups = _groups(tiny_navit())
    assert groups["blocks.0.attn.qkv.weight"] == "body"
    assert groups["embeds.proj.weight"] == "body"
    assert groups["attn_pool.kv.weight"] == "body"
    assert [name for name, group in groups.items() if group == "head"] == ["head.weight"]
    undecayed = {name for name, group in groups.items() if group == "none"}
    for name in undecayed:
        words = ("norm", "bias", "pos_embed", "latent")
        assert any(word in name for word in words), name
    for name in ("embeds.pos_embed_y", "embeds.pos_embed_x", "attn_pool.latent", "head.bias"):
        assert name in undecayed


@pytest.mark.parametrize("preset", ["navit_b16", "megavit_1b"])
def test_every_parameter_of_a_preset_is_in_the_group_of_its_shape(preset):
    with torch.device("meta"):
        model = build_model(ModelConfig(preset=preset, num_classes=10, depth=1))
    for name, group in _groups(model).items():
        is_matrix = name.endswith(".weight") and model.get_parameter(name).ndim == 2
        assert (group != "none") == is_matrix, name


def test_every_trainable_parameter_is_in_exactly_one_group_with_its_rate():
    model = tiny_navit()
    model.head.bias.requires_grad = False
    groups = parameter_groups(model, OptimConfig(weight_decay=0.3, head_weight_decay=3.0))
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [group["weight_decay"] for group in groups] == [0.3, 3.0, 0.0]
    assert groups[1]["params"] == [model.head.weight]
    same = parameter_groups(model, OptimConfig(weight_decay=0.3))
    assert [group["weight_decay"] for group in same] == [0.3, 0.3, 0.0]


def test_the_order_of_the_optimizer_is_that_of_its_groups():
    model = tiny_navit()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig())
    ordered = [names[id(p)] for group in groups for p in group["params"]]
    assert optimizer_order(parameter_shapes(model)) == ordered


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimConfig())
