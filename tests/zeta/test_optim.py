"""Which parameters AdamW decays."""

import pytest
from torch import nn

from tests.zeta.training import tiny_navit
from zeta.optim import build_optimizer, is_decayed, parameter_groups, parameter_shapes
from zeta.train_config import OptimConfig


def test_matrices_are_decayed_and_norms_biases_tables_and_the_latent_are_not():
    shapes = parameter_shapes(tiny_navit())
    decayed = {name for name, shape in shapes.items() if is_decayed(name, shape)}
    assert "blocks.0.attn.qkv.weight" in decayed
    assert "embeds.proj.weight" in decayed
    assert "head.weight" in decayed
    for name in shapes.keys() - decayed:
        words = ("norm", "bias", "pos_embed", "latent")
        assert any(word in name for word in words), name
    for name in ("embeds.pos_embed_y", "embeds.pos_embed_x", "attn_pool.latent", "head.bias"):
        assert name in shapes.keys() - decayed


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = tiny_navit()
    model.head.bias.requires_grad = False
    groups = parameter_groups(model, 0.3)
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimConfig())
