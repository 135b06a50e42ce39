"""Which parameters AdamW decays, and at which rate."""

import pytest
import torch
from torch import nn

from tests.zeta.foreign_optimizer import Lion
from tests.zeta.training import tiny_navit
from zeta.models.config import ModelConfig, build_model
from zeta.models.parameters import parameter_rules, parameter_shapes
from zeta.train.config import OptimConfig, TrainConfig
from zeta.train.optim import (
    build_optimizer,
    check_optimizer,
    layer_scales,
    parameter_groups,
    state_per_weight,
)
from zeta.train.optimizers.table import OPTIMIZERS, highest_stage, optimizer_name
from zeta.zero.unnamed_order import unnamed_order


def _groups(model):
    return {name: rule.group for name, rule in parameter_rules(model).items()}


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
    assert {group["lr_scale"] for group in groups} == {1.0}
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [group["weight_decay"] for group in groups] == [0.3, 3.0, 0.0]
    assert groups[1]["params"] == [model.head.weight]
    same = parameter_groups(model, OptimConfig(weight_decay=0.3))
    assert [group["weight_decay"] for group in same] == [0.3, 0.3, 0.0]


def test_the_order_of_old_checkpoints_is_that_of_the_groups():
    model = tiny_navit()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for decay in (1.0, 0.5):  # a checkpoint is read without the config that it was written under
        groups = parameter_groups(model, OptimConfig(layer_decay=decay))
        ordered = [names[id(p)] for group in groups for p in group["params"]]
        assert unnamed_order(parameter_shapes(model)) == ordered
        assert len(groups) == (3 if decay == 1 else 4 + 1 + 4)


def test_the_learning_rate_falls_by_the_layer_and_the_head_has_all_of_it():
    scales = layer_scales(dict(tiny_navit(depth=3, registers=2).named_parameters()), 0.5)
    of_first_part = {"embeds": 1 / 16, "norm": 1, "attn_pool": 1, "head": 1}
    of_first_part |= {f"blocks.{i}": 2.0 ** (i - 3) for i in range(3)}
    for name, scale in scales.items():
        (expected,) = (s for part, s in of_first_part.items() if name.startswith(part + "."))
        assert scale == expected, name
    assert set(layer_scales(scales, 1.0).values()) == {1.0}


def test_each_tower_has_layers_of_its_own():
    names = ["image.blocks.0.w", "image.blocks.1.w", "text.blocks.0.w", "text.embeds.token_embed"]
    names += ["image.embeds.proj.weight", "text.head.weight", "logits.scale"]
    assert list(layer_scales(names, 0.1).values()) == pytest.approx(
        [0.01, 0.1, 0.1, 0.01, 0.001, 1, 1]
    )


def test_a_layer_decay_out_of_range_is_refused_by_name():
    for decay in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"optim.layer_decay is"):
            OptimConfig(layer_decay=decay)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimConfig())


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if highest_stage(kind) > 0])
def test_the_optimizer_of_a_kind_has_the_rate_and_the_params_asked_for(kind):
    params = {"momentum": 0.9} if kind == "sgd" else {"eps": 1e-5}
    optimizer = build_optimizer(tiny_navit(), OptimConfig(kind=kind, params=params, lr=0.25))
    assert type(optimizer) is getattr(torch.optim, optimizer_name(kind))
    assert type(optimizer).__name__.lower() == kind
    for group in optimizer.param_groups:
        assert {name: group[name] for name in (*params, "lr")} == {**params, "lr": 0.25}
        assert kind != "adamw" or (group["betas"], group["fused"]) == ((0.9, 0.999), True)


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("lamb", {}, "optim.kind is 'lamb'; choose one of adam, adamax, adamw,"),
        ("sgd", {"momentun": 1}, "optim.params.momentun: the optimizer sgd does not take it;"),
        ("sgd", {"lr": 1}, "optim.params.lr is decided by optim.lr: leave it out"),
        ("adamw", {"betas": [0, 0]}, "optim.params.betas is decided by optim.betas"),
        ("sgd", {"nesterov": True}, "optim.params is {'nesterov': True}, which the optimizer sgd"),
    ],
)
def test_an_option_that_an_optimizer_does_not_take_is_refused_by_name(kind, params, message):
    with pytest.raises(ValueError, match="optim") as refused:
        check_optimizer(OptimConfig(kind=kind, params=params), TrainConfig())
    assert message in str(refused.value)


def test_an_optimizer_of_ones_own_trains_once_it_is_in_the_table(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "lion", Lion)
    config = OptimConfig(kind="lion", params={"short": 0.5}, lr=0.5, weight_decay=0.1)
    module = nn.Linear(2, 1, bias=False)
    before = module.weight.detach().clone()
    optimizer = build_optimizer(module, config)
    module.weight.grad = torch.tensor([[3.0, -0.1]])
    optimizer.step()
    by_hand = before * (1 - 0.5 * 0.1) - 0.5 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(module.weight.detach(), by_hand)
    average = optimizer.state[module.weight]["exp_avg"]
    torch.testing.assert_close(average, 0.01 * module.weight.grad)
    assert state_per_weight(config, module) == 1
    assert optimizer_name("lion") == "Lion"
    with pytest.raises(ValueError, match=r"optim\.params\.middle: the optimizer lion does not"):
        check_optimizer(OptimConfig(kind="lion", params={"middle": 0.5}), TrainConfig())
