"""Initial values follow the rules of the parameters, and learn fast on small data."""

import pytest
import torch
from torch import nn

from tests.benchmarks.small_data import accuracy_after
from tests.zeta.training import tiny_navit
from zeta.models.initialization import initialize
from zeta.models.parameters import LEARNED_TOKEN, parameter_rules


class Masked(nn.Module):
    """An encoder with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.image = tiny_navit()
        self.mask_token = nn.Parameter(torch.empty(1, 1, 8))


def test_a_new_parameter_is_one_entry_and_without_it_is_refused_by_name(monkeypatch):
    model = Masked()
    with pytest.raises(ValueError, match=r"mask_token has no rule.*parameter_rules of Masked"):
        initialize(model, 0)
    monkeypatch.setattr(Masked, "parameter_rules", {"mask_token": LEARNED_TOKEN}, raising=False)
    initialize(model, 0)
    assert 0 < model.mask_token.abs().max() <= 0.04
    groups = {name: rule.group for name, rule in parameter_rules(model).items()}
    assert groups["mask_token"] == "none"
    assert groups["image.head.weight"] == "head"


def test_a_module_may_declare_another_rule_for_a_parameter_inside_it(monkeypatch):
    rules = {"mask_token": LEARNED_TOKEN, "image.head.weight": LEARNED_TOKEN}
    monkeypatch.setattr(Masked, "parameter_rules", rules, raising=False)
    assert parameter_rules(Masked())["image.head.weight"] is LEARNED_TOKEN


@pytest.mark.slow
def test_digits_are_learned_in_steps_in_which_tables_of_deviation_0_02_do_not_learn_them():
    ours, usual = (accuracy_after(150, tables, seed=0) for tables in ("zeta", "white 0.02"))
    assert ours > 0.8
    assert ours > usual + 0.3
