"""A kind of position from outside of zeta: an entry in the table, and a rule for its parameter."""

import pytest
import torch

from tests.zeta import foreign_position
from tests.zeta.training import tiny_navit
from zeta.models.config import ModelConfig, build_model
from zeta.models.navit import PatchPositionEmbedding
from zeta.models.parameters import parameter_rules

IMAGES = [(8, 16), (16, 4), (12, 12)]
"""Heights and widths in pixels; a patch has 4 x 4."""


def small(**changes):
    return tiny_navit(position="radial", qk_norm=True, **changes).eval()


def test_a_position_of_ones_own_is_the_same_packed_and_alone(monkeypatch):
    foreign_position.register(monkeypatch)
    model = small()
    assert [n for n, _ in model.embeds.named_parameters()] == ["pos_embed_r", "proj.weight"]
    images = [torch.randn(1, *size) for size in IMAGES]
    alone = torch.cat([model([image]) for image in images])
    torch.testing.assert_close(model(images), alone, atol=1e-5, rtol=1e-5)


def test_a_position_of_ones_own_is_read_as_it_says(monkeypatch):
    foreign_position.register(monkeypatch)
    coords = torch.tensor([(0, 0), (1, 1), (-1, -1)])
    grids = torch.tensor([(3, 3)]).expand(3, 2)
    corner, centre, padding = foreign_position.weights(coords, grids, (2, 4))
    # 3 x 3 patches: the middle of a corner patch lies at 2/3 of the way, 2 of 3 rows.
    torch.testing.assert_close(corner, torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert centre.tolist() == [1, 0, 0, 0]
    assert padding.eq(0).all()
    model = small()
    with torch.no_grad():
        model.embeds.pos_embed_r.zero_()
    before = model([torch.ones(1, 12, 12)])
    with torch.no_grad():
        model.embeds.pos_embed_r[0, 0] = torch.randn(16)  # the row of the middle patch
    assert not torch.allclose(before, model([torch.ones(1, 12, 12)]))


def test_a_position_of_ones_own_has_its_initial_value_and_no_weight_decay(monkeypatch):
    foreign_position.register(monkeypatch)
    model = small()
    assert parameter_rules(model)["embeds.pos_embed_r"].group == "none"
    assert model.embeds.pos_embed_r.shape == (1, 4, 16)
    assert torch.equal(model.embeds.pos_embed_r, small().embeds.pos_embed_r)
    assert not torch.equal(model.embeds.pos_embed_r, small(seed=1).embeds.pos_embed_r)
    config = ModelConfig(preset="navit_ti16", num_classes=2, position="radial")
    assert build_model(config, 0).embeds.position == "radial"


def test_a_table_without_a_rule_is_refused_by_name(monkeypatch):
    rules = PatchPositionEmbedding.parameter_rules
    foreign_position.register(monkeypatch)
    monkeypatch.setattr(PatchPositionEmbedding, "parameter_rules", rules)
    with pytest.raises(ValueError, match=r"pos_embed_r has no rule for its initial value"):
        small()
