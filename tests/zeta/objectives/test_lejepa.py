"""LeJEPA's loss and gradient are those of one batch, whatever the packs and ranks."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from data_pipeline.shards.build import build_shards
from data_pipeline.shards.weighted import open_shards
from launch.config.load import load_config
from launch.config.resolve import resolve_with_shards
from tests.data_pipeline.shard_fixtures import jpeg
from tests.zeta.packs import make_pack
from zeta.metric_names import EMBEDDING_RANK as RANK
from zeta.objectives import build_for_objective, build_objective
from zeta.objectives.base import Step
from zeta.objectives.config import LejepaConfig, ObjectiveConfig
from zeta.objectives.embedding_spread import effective_rank, embedding_spread
from zeta.objectives.lejepa import EmbeddingTally
from zeta.objectives.sigreg import (
    characteristic_sums,
    random_directions,
    row_gradient,
    statistic,
)
from zeta.objectives.view_model import ViewOutputs
from zeta.train.collapse import CollapseWatch

POINTS = torch.linspace(0, 3, 17)


def plain_statistic(rows, images, directions):
    """SIGReg of all rows, written as the paper has it and differentiated by torch."""
    angles = (rows @ directions)[:, :, None] * POINTS
    normal = (-(POINTS**2) / 2).exp()
    error = (angles.cos().mean(0) - normal).square() + angles.sin().mean(0).square()
    return images * torch.trapezoid(2 * error * normal, POINTS).mean()


def test_the_statistic_and_its_gradient_are_those_of_the_definition():
    torch.manual_seed(0)
    rows = torch.randn(50, 8, requires_grad=True)
    directions = random_directions(8, 32, seed=3, device=rows.device)
    expected = plain_statistic(rows, 10, directions)
    (by_rows,) = torch.autograd.grad(expected, rows)
    value, by_sums = statistic(characteristic_sums(rows.detach(), 10, directions))
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(
        row_gradient(rows.detach(), directions, by_sums), by_rows, rtol=1e-4, atol=1e-7
    )


def test_a_standard_normal_has_the_least_statistic():
    torch.manual_seed(0)
    rows = torch.randn(4000, 6)
    directions = random_directions(6, 64, seed=0, device=rows.device)

    def value(changed):
        return float(statistic(characteristic_sums(changed, 4000, directions))[0])

    normal = value(rows)
    assert normal < 3  # its expectation does not grow with the number of rows
    assert value(2 * rows) > 100 * normal
    assert value(rows + 1) > 100 * normal
    assert value(torch.zeros_like(rows)) > 100 * normal
    assert value(rows[:, :1].expand_as(rows)) > 100 * normal


@pytest.mark.parametrize(
    ("share", "why"),
    [(0, "is 0, so nothing would keep embeddings apart"), (1.0, "is 1, so nothing would make the")],
)
def test_a_trade_off_that_leaves_one_half_of_the_loss_out_is_refused(share, why):
    with pytest.raises(ValueError, match=f"trade_off {why}.*above 0 and below 1, as 0.05"):
        LejepaConfig(trade_off=share)
    LejepaConfig(trade_off=abs(share - 1e-6))


def test_directions_are_a_function_of_the_seed():
    same = [random_directions(5, 7, seed, torch.device("cpu")) for seed in (1, 1, 2)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])
    torch.testing.assert_close(same[0].norm(dim=0), torch.ones(7))


def step(packs, projected, *, trade_off=0.3, seed=5):
    """The losses and gradients of a step's packs on one rank."""
    config = ObjectiveConfig(kind="lejepa", lejepa=LejepaConfig(trade_off=trade_off, slices=16))
    objective = build_objective(config, 1)
    objective.begin_step(Step(0, seed, share=None))
    leaves = [p.clone().requires_grad_() for p in projected]
    outputs = [ViewOutputs(leaf, torch.zeros(len(leaf), 2)) for leaf in leaves]
    losses = objective.join([ViewOutputs(*(t.detach() for t in o)) for o in outputs], packs)
    total = sum(
        loss.loss_sum(output, pack)
        for loss, output, pack in zip(losses, outputs, packs, strict=True)
    )
    total.backward()
    return total.detach(), [leaf.grad for leaf in leaves]


def views(groups, rejected=(), local=None):
    """A pack whose rows are views: `groups` names the image of each row."""
    images = [torch.zeros(3, 4, 4, dtype=torch.uint8)] * len(groups)
    pack = make_pack(images, 4, len(groups) + 2, len(groups) + 1)
    first = {name: groups.index(name) for name in groups}
    view_of = torch.tensor([*(first[name] for name in groups), -1])
    weights = torch.tensor([*(float(name not in rejected) for name in groups), 0.0])
    marks = None if local is None else torch.tensor([*local, False])
    return replace(pack, view_of=view_of, weights=weights, local_views=marks)


def test_the_loss_and_its_gradient_are_those_of_one_batch():
    torch.manual_seed(1)
    local = [False, False, True, True]
    packs = [
        views("aaaabbbb", local=2 * local),
        views("cccc", local=local),
        views("ddddeeee", rejected="e", local=2 * local),
    ]
    projected = [torch.randn(len(pack.weights), 6) for pack in packs]
    total, gradients = step(packs, projected)
    leaves = [p.clone().requires_grad_() for p in projected]
    images = [leaves[0][:4], leaves[0][4:8], leaves[1][:4], leaves[2][:4]]
    rows = torch.cat(images)
    agreement = sum((x - x[:2].mean(0)).square().mean(1).sum() for x in images)
    spread = plain_statistic(rows, 4, random_directions(6, 16, 5, rows.device)) * len(rows)
    expected = 0.7 * agreement + 0.3 * spread
    expected.backward()
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    for ours, leaf in zip(gradients, leaves, strict=True):
        torch.testing.assert_close(ours, leaf.grad, rtol=1e-4, atol=1e-6)


def test_packs_may_be_divided_in_any_way():
    torch.manual_seed(2)
    whole = views("aabbccdd")
    rows = torch.randn(9, 6)
    total, (gradient,) = step([whole], [rows])
    parts = [views("aabb"), views("ccdd")]
    split, gradients = step(parts, [torch.cat([rows[:4], rows[8:]]), rows[4:]])
    torch.testing.assert_close(split, total)
    torch.testing.assert_close(torch.cat([g[:4] for g in gradients]), gradient[:8])


def test_one_image_in_a_step_and_none_in_a_pack_give_finite_losses():
    packs = [views("aa"), views("bb", rejected="b")]
    total, gradients = step(packs, [torch.randn(3, 6), torch.randn(3, 6)])
    assert torch.isfinite(total)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert not gradients[1].any()


def test_a_step_that_is_not_finite_shows_in_its_loss():
    total, _ = step([views("aabb")], [torch.full((5, 6), float("nan"))])
    assert not torch.isfinite(total)


def test_the_head_of_the_encoder_does_not_learn():
    from zeta.models.config import ModelConfig

    model = ModelConfig(
        image_size=32, patch_size=16, num_classes=1, dim=16, depth=1, heads=2, mlp_dim=32
    )
    config = ObjectiveConfig(kind="lejepa", lejepa=LejepaConfig(hidden=8, dim=4))
    built = build_for_objective(model, config, seed=0)
    frozen = [name for name, p in built.named_parameters() if not p.requires_grad]
    assert frozen == [n for n, _ in built.named_parameters() if n.startswith("image.head.")]


def test_a_collapse_is_said_once_until_the_embeddings_vary_again():
    watch = CollapseWatch()
    assert watch.warning({"loss": 1.0}) is None
    assert "vary in only 1.2 directions" in watch.warning({RANK: 1.2})
    assert watch.warning({RANK: 1.1}) is None
    assert watch.warning({RANK: 9.0}) is None
    assert "objective.lejepa.trade_off" in watch.warning({RANK: 1.0})


def test_fewer_views_than_are_compared_are_refused_with_what_to_set(tmp_path):
    folder = tmp_path / "shards"
    build_shards([("a", {"jpg": jpeg(24, 24, 0)})], folder)
    settings = [f"data.shards={folder}", "objective.kind=lejepa"]
    config = load_config("demo", [*settings, "objective.label_smoothing=0"])
    with pytest.raises(ValueError, match=r"at least 2, .* make 1: set data\.views=2"):
        resolve_with_shards(config, open_shards(str(folder)))


def test_the_effective_rank_counts_the_channels_that_vary():
    assert effective_rank(torch.eye(8)) == pytest.approx(8)
    assert effective_rank(torch.diag(torch.tensor([1.0, 1, 0, 0]))) == pytest.approx(2)
    assert effective_rank(torch.zeros(4, 4)) == 1


@pytest.mark.parametrize("noise", [0, 1e-7, 1e-5, 1e-3])
def test_embeddings_in_one_point_have_rank_one_whatever_rounding_adds(noise):
    rows = 1 + torch.randn(64) + noise * torch.randn(200, 64)
    assert embedding_spread(rows)[RANK] == 1
    rows[:100] += 0.1 * torch.randn(100, 64)
    assert embedding_spread(rows)[RANK] > 10


def test_embeddings_that_are_not_finite_are_said_to_be_so_and_are_no_collapse():
    rows = torch.randn(40, 4)
    rows[7, 2] = float("inf")
    spread = embedding_spread(rows)
    assert all(math.isnan(value) for value in spread.values())
    assert "are not finite: " in CollapseWatch().warning(spread)


def test_the_spread_of_a_few_images_is_not_told():
    for count, told in ((31, False), (32, True)):
        tally = EmbeddingTally()
        pack = views("a" * count)
        tally.add(ViewOutputs(torch.zeros(count + 1, 2), torch.randn(count + 1, 4)), pack)
        assert (RANK in tally.metrics()) == told


@pytest.mark.slow
def test_ranks_stages_and_joining_change_nothing(ranks, tmp_path):
    cases = {
        1: [(0, 1), (0, 6)],
        2: [(0, 1), (1, 3), (2, 2), (3, 3)],
        3: [(2, 1), (3, 2)],
    }
    found = {}
    for world_size, of_world in cases.items():
        out = tmp_path / f"{world_size}.json"
        arguments = {"packs_per_step": 6, "cases": of_world, "out": str(out)}
        ranks.run("tests.zeta.lejepa_jobs.training", world_size, arguments)
        found |= {(world_size, k): v for k, v in json.loads(out.read_text()).items()}
    reference = found[1, "stage 0, 1 packs"]
    assert reference["losses"][0] != reference["losses"][1]
    for case in found.values():
        assert case["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        torch.testing.assert_close(
            torch.tensor(case["weights"]), torch.tensor(reference["weights"]), rtol=0, atol=1e-5
        )
