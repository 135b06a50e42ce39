"""Classification losses against their definitions."""

from dataclasses import replace

import pytest
import torch

from tests.zeta.training import NUM_CLASSES, lane_pack
from zeta.exit_codes import RunError
from zeta.objectives import build_objective
from zeta.objectives.config import ObjectiveConfig


def _pack():
    pack = lane_pack(step=2, lane=0)
    assert 1 < pack.num_images < len(pack.weights)
    return pack


def _outputs(pack):
    return torch.randn(len(pack.weights), NUM_CLASSES, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_is_the_sum_of_smoothed_cross_entropies_of_weighted_images(smoothing):
    pack = _pack()
    outputs = _outputs(pack)
    objective = build_objective(ObjectiveConfig("softmax", smoothing), NUM_CLASSES)
    expected = 0.0
    for i in range(pack.num_images):
        log_p = outputs[i].log_softmax(0)
        expected -= (1 - smoothing) * log_p[pack.labels[i]] + smoothing * log_p.mean()
    assert objective.loss_sum(outputs, pack).item() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sigmoid_is_the_sum_of_binary_cross_entropies_over_classes(smoothing):
    pack = _pack()
    outputs = _outputs(pack)
    objective = build_objective(ObjectiveConfig("sigmoid", smoothing), NUM_CLASSES)
    expected = 0.0
    for i in range(pack.num_images):
        for k in range(NUM_CLASSES):
            y = (1 - smoothing) * float(pack.labels[i] == k) + smoothing / NUM_CLASSES
            p = torch.sigmoid(outputs[i, k])
            expected -= float(y * p.log() + (1 - y) * (1 - p).log())
    assert objective.loss_sum(outputs, pack).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_unused_rows_count_neither_in_the_loss_nor_in_its_gradient(kind):
    pack = _pack()
    objective = build_objective(ObjectiveConfig(kind), NUM_CLASSES)
    outputs = _outputs(pack)
    wild = outputs.clone()
    wild[pack.weights == 0] = 1e30
    wild.requires_grad_()
    loss = objective.loss_sum(wild, pack)
    assert loss.item() == objective.loss_sum(outputs, pack).item()
    loss.backward()
    assert (wild.grad[pack.weights == 0] == 0).all()


def test_an_empty_pack_has_a_loss_of_zero_with_a_gradient():
    pack = lane_pack(step=0, lane=0, images=0)
    outputs = _outputs(pack).requires_grad_()
    loss = build_objective(ObjectiveConfig(), NUM_CLASSES).loss_sum(outputs, pack)
    loss.backward()
    assert loss.item() == 0.0
    assert (outputs.grad == 0).all()


def test_top1_counts_weighted_images_whose_largest_output_is_the_label():
    pack = _pack()
    outputs = torch.zeros(len(pack.weights), NUM_CLASSES)
    outputs[torch.arange(pack.num_images), pack.labels[: pack.num_images]] = 1.0
    objective = build_objective(ObjectiveConfig(), NUM_CLASSES)
    assert objective.counts(outputs, pack)["top1"].item() == pack.num_images
    outputs[0] = -outputs[0]
    outputs[0, (pack.labels[0] + 1) % NUM_CLASSES] = 1.0
    assert objective.counts(outputs, pack)["top1"].item() == pack.num_images - 1


@pytest.mark.parametrize("label", [-1, NUM_CLASSES])
def test_a_label_outside_the_classes_names_the_sample(label):
    pack = _pack()
    labels = pack.labels.clone()
    labels[1] = label
    objective = build_objective(ObjectiveConfig(), NUM_CLASSES)
    objective.check(pack)
    message = f"sample {int(pack.sample_ids[1])} has label {label}; labels must be 0 to 4"
    with pytest.raises(RunError, match=message):
        objective.check(replace(pack, labels=labels))


def test_the_tally_gives_means_over_the_images_of_all_packs_and_the_loss_of_the_true_labels():
    objective = build_objective(ObjectiveConfig(), NUM_CLASSES)
    smoothed = build_objective(ObjectiveConfig(label_smoothing=0.1), NUM_CLASSES)
    packs = [lane_pack(step=2, lane=0), lane_pack(step=1, lane=1), lane_pack(0, 0, images=0)]
    tally, loss, top1, images = smoothed.tally(), 0.0, 0, 0
    for pack in packs:
        outputs = _outputs(pack)
        tally.add(outputs, pack)
        loss += objective.loss_sum(outputs, pack).item()
        top1 += objective.counts(outputs, pack)["top1"].item()
        images += pack.num_images
    expected = {"images": images, "loss": loss / images, "top1": top1 / images, "top5": 1.0}
    assert tally.metrics() == pytest.approx(expected, rel=1e-6)
    empty = objective.tally()
    empty.add(_outputs(packs[2]), packs[2])
    assert empty.metrics() == {"images": 0.0}


def _with_label_sets(pack):
    sets = torch.full((len(pack.weights), 3), -1)
    sets[0], sets[1, :2] = torch.tensor([0, 2, 4]), torch.tensor([3, 1])
    return replace(pack, label_sets=sets)


def test_sigmoid_learns_lists_of_labels_the_empty_one_too():
    pack = _with_label_sets(lane_pack(step=3, lane=0))
    assert pack.num_images == 3
    outputs, smoothing = _outputs(pack), 0.1
    objective = build_objective(ObjectiveConfig("sigmoid", smoothing), NUM_CLASSES)
    expected = 0.0
    for i, labels in enumerate([{0, 2, 4}, {3, 1}, set()]):
        for k in range(NUM_CLASSES):
            y = (1 - smoothing) * float(k in labels) + smoothing / NUM_CLASSES
            p = torch.sigmoid(outputs[i, k])
            expected -= y * torch.log(p) + (1 - y) * torch.log(1 - p)
    objective.check(pack)
    assert objective.loss_sum(outputs, pack).item() == pytest.approx(float(expected), rel=1e-6)


def test_top1_of_a_list_is_a_hit_on_any_of_its_labels():
    pack = _with_label_sets(lane_pack(step=3, lane=0))
    objective = build_objective(ObjectiveConfig("sigmoid"), NUM_CLASSES)
    outputs = torch.zeros(len(pack.weights), NUM_CLASSES)
    outputs[0, 2] = outputs[1, 3] = outputs[2, 0] = 1.0  # the third image has no label to hit
    assert objective.counts(outputs, pack)["top1"].item() == 2
    outputs[0, 3] = 2.0
    assert objective.counts(outputs, pack)["top1"].item() == 1


def test_lists_of_labels_are_checked_and_softmax_refuses_them_by_name():
    pack = _with_label_sets(lane_pack(step=3, lane=0))
    with pytest.raises(RunError, match=r"set objective\.kind=sigmoid"):
        build_objective(ObjectiveConfig("softmax"), NUM_CLASSES).check(pack)
    with pytest.raises(RunError, match=f"sample {int(pack.sample_ids[0])} has label 4"):
        build_objective(ObjectiveConfig("sigmoid"), NUM_CLASSES - 1).check(pack)
