"""Scores by image: in order of sample, whatever packs and ranks they came in."""

import numpy as np
import pytest
import torch

from tests.zeta.training import NUM_CLASSES, lane_pack, tiny_navit
from zeta.distributed import RankInfo, World
from zeta.objectives import build_objective
from zeta.objectives.config import ObjectiveConfig
from zeta.probes.image_scores import ImageScores


class TwoRanks(World):
    """This process as both ranks: what the other one has is given."""

    def __init__(self, other):
        super().__init__(RankInfo(), torch.device("cpu"))
        self._other = other

    def gather(self, value):
        return [value, self._other]


def _scored(packs, world):
    model = tiny_navit().eval()
    scores = ImageScores(build_objective(ObjectiveConfig(), NUM_CLASSES), world)
    with torch.no_grad():
        for pack in packs:
            scores.add(model(pack), pack)
    return scores


def test_the_means_are_those_of_the_tally_and_the_rows_are_in_order():
    packs = [lane_pack(step, 0) for step in (3, 1, 4)]
    world = World(RankInfo(), torch.device("cpu"))
    scores = _scored(packs, world)
    found = scores.metrics()
    plain = build_objective(ObjectiveConfig(), NUM_CLASSES).tally()
    with torch.no_grad():
        for pack in packs:
            plain.add(tiny_navit().eval()(pack), pack)
    assert found == pytest.approx(plain.metrics())
    ids = [int(i) for pack in packs for i in pack.sample_ids[pack.weights > 0]]
    assert scores.rows["sample_id"].tolist() == sorted(ids)
    assert scores.rows["top1"].mean() == pytest.approx(found["top1"])


def test_two_ranks_and_another_order_give_the_same_numbers_to_the_last_bit():
    packs = [lane_pack(step, 0) for step in (1, 3, 4, 6)]
    world = World(RankInfo(), torch.device("cpu"))
    alone = _scored(packs, world)
    other = _scored(packs[2:], world)
    other.metrics()
    of_other = {name: column.copy() for name, column in other.rows.items()}
    shared = _scored(packs[1::-1], TwoRanks(of_other))
    assert shared.metrics() == alone.metrics()
    for name, column in alone.rows.items():
        assert np.array_equal(shared.rows[name], column), name
