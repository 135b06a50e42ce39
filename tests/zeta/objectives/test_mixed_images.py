"""The loss of images mixed of two: cross-entropy with both classes, by their shares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.zeta.training import MAX_IMAGES, NUM_CLASSES, lane_pack
from zeta.objectives import OBJECTIVES, build_objective
from zeta.objectives.config import ObjectiveConfig
from zeta.packed import join_packs


def mixed_pack(step: int = 0, lane: int = 0, images: int = 3, several: bool = False):
    """A pack whose image 0 is mixed with 1, 1 alone, and 2 mixed with 0."""
    pack = lane_pack(step, lane, images=images)
    partners = torch.tensor([1, -1, 0, -1])
    shares = torch.tensor([0.7, 1.0, 0.2, 1.0])
    sets = None
    if several:
        sets = torch.tensor([[3, 1], [2, -1], [-1, -1], [-1, -1]])
        pack = replace(pack, labels=sets[:, 0])
    elif images:
        pack = replace(pack, labels=torch.tensor([3, 1, 4, -1]))
    return replace(pack, mixed_with=partners, own_shares=shares, label_sets=sets)


def outputs(rows: int, seed: int = 0) -> torch.Tensor:
    made = torch.randn(rows, NUM_CLASSES, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_()


def soft_targets(smoothing: float) -> torch.Tensor:
    targets = torch.zeros(3, NUM_CLASSES)
    targets[0, 3], targets[0, 1] = 0.7, 0.3
    targets[1, 1] = 1.0
    targets[2, 4], targets[2, 3] = 0.2, 0.8
    return targets * (1 - smoothing) + smoothing / NUM_CLASSES


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_is_the_cross_entropy_with_soft_targets(smoothing):
    objective = build_objective(ObjectiveConfig("softmax", smoothing), NUM_CLASSES)
    found, wanted = outputs(MAX_IMAGES), outputs(MAX_IMAGES)
    loss = objective.loss_sum(found, mixed_pack())
    expected = F.cross_entropy(wanted[:3], soft_targets(smoothing), reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    assert torch.allclose(found.grad, wanted.grad, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("several", [False, True])
def test_sigmoid_is_the_binary_cross_entropy_with_soft_targets(smoothing, several):
    targets = soft_targets(smoothing=0.0)
    if several:  # 3 and 1, 2 alone, none at all
        sets = torch.zeros(3, NUM_CLASSES)
        sets[0, [3, 1]], sets[1, 2] = 1.0, 1.0
        targets = torch.stack([0.7 * sets[0] + 0.3 * sets[1], sets[1], 0.8 * sets[0]])
    targets = targets * (1 - smoothing) + smoothing / NUM_CLASSES
    objective = build_objective(ObjectiveConfig("sigmoid", smoothing), NUM_CLASSES)
    made = outputs(MAX_IMAGES)
    loss = objective.loss_sum(made, mixed_pack(several=several))
    expected = F.binary_cross_entropy_with_logits(made[:3], targets, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_images_that_are_not_mixed_have_the_loss_of_their_class_to_the_bit(kind):
    alone = lane_pack(step=2, lane=0)
    rows = torch.full((MAX_IMAGES,), -1)
    unmixed = replace(alone, mixed_with=rows, own_shares=torch.ones(MAX_IMAGES))
    objective, made = build_objective(ObjectiveConfig(kind), NUM_CLASSES), outputs(MAX_IMAGES)
    assert torch.equal(objective.loss_sum(made, alone), objective.loss_sum(made, unmixed))
    counts = [objective.counts(made, pack)["top1"] for pack in (alone, unmixed)]
    assert counts[0] == counts[1]


def test_top1_counts_the_class_with_the_larger_share():
    objective = build_objective(ObjectiveConfig(), NUM_CLASSES)
    made = F.one_hot(torch.tensor([3, 1, 3, 0]), NUM_CLASSES).float()
    assert objective.counts(made, mixed_pack())["top1"].item() == 3
    made = F.one_hot(torch.tensor([1, 1, 4, 0]), NUM_CLASSES).float()
    assert objective.counts(made, mixed_pack())["top1"].item() == 1


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_joined_packs_have_the_loss_gradient_and_counts_of_each_alone(kind):
    packs = [mixed_pack(0, 0), lane_pack_unmixed(), mixed_pack(3, 1)]
    objective = build_objective(ObjectiveConfig(kind), NUM_CLASSES)
    alone = [outputs(MAX_IMAGES, seed) for seed in range(3)]
    together = torch.cat([made.detach() for made in alone]).requires_grad_()
    joined = join_packs(packs, "cpu")
    assert joined.mixed_with.tolist() == [1, -1, 0, -1, -1, -1, -1, -1, 9, -1, 8, -1]
    losses = [objective.loss_sum(*each) for each in zip(alone, packs, strict=True)]
    loss = objective.loss_sum(together, joined)
    assert loss.item() == pytest.approx(sum(each.item() for each in losses), rel=1e-6)
    torch.stack(losses).sum().backward()
    loss.backward()
    assert torch.allclose(together.grad, torch.cat([made.grad for made in alone]), atol=1e-7)
    counts = [objective.counts(*each)["top1"] for each in zip(alone, packs, strict=True)]
    assert objective.counts(together, joined)["top1"] == sum(counts)


def lane_pack_unmixed():
    rows = torch.full((MAX_IMAGES,), -1)
    return replace(lane_pack(1, 0), mixed_with=rows, own_shares=torch.ones(MAX_IMAGES))


def test_wild_outputs_of_unused_rows_do_not_reach_the_gradient():
    objective = build_objective(ObjectiveConfig(), NUM_CLASSES)
    wild = outputs(MAX_IMAGES).detach()
    wild[3] = 1e30
    wild.requires_grad_()
    objective.loss_sum(wild, mixed_pack()).backward()
    assert torch.isfinite(wild.grad).all()
    assert (wild.grad[3] == 0).all()


def test_only_classification_learns_from_mixed_images():
    learns = {kind for kind, declared in OBJECTIVES.items() if declared.learns_mixed}
    assert learns == {"softmax", "sigmoid"}
