"""Image-text losses against their definitions, one process; on several ranks see test_engine."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.zeta.training import ROOT
from zeta.objectives import JointObjective, PackObjective, build_objective, pairs
from zeta.objectives.config import ObjectiveConfig
from zeta.objectives.pairs import ImageTextOutputs

KINDS = ("siglip", "clip")


def definition(kind, images, texts, scale, bias):
    """The loss of each pair, written out with autograd over the whole matrix."""
    logits = scale * images @ texts.T + bias
    if kind == "siglip":
        signs = 2 * torch.eye(len(images)) - 1
        return -F.logsigmoid(signs * logits).sum(1)
    targets = torch.arange(len(images))
    by_image = F.cross_entropy(logits, targets, reduction="none")
    by_text = F.cross_entropy(logits.T, targets, reduction="none")
    return (by_image + by_text) / 2


def random_outputs(count, seed=0, scale=8.0, bias=-3.0, dim=6):
    generator = torch.Generator().manual_seed(seed)
    images, texts = (F.normalize(torch.randn(count, dim, generator=generator)) for _ in range(2))
    return ImageTextOutputs(images, texts, torch.tensor(scale), torch.tensor(bias))


def recall_of(outputs, within=(1, 5)):
    """Return the share of pairs that `retrieval_hits` counts as found, by name."""
    hits = pairs.retrieval_hits(outputs, within)
    return {name: found.double().mean().item() for name, found in hits.items()}


def unscaled(images, texts):
    return ImageTextOutputs(images, texts, torch.tensor(1.0), torch.tensor(1.0))


def pack_of(count, used):
    return SimpleNamespace(weights=(torch.arange(count) < used).float(), text_cut=None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held", [2**22, 20])
def test_losses_and_gradients_of_all_packs_are_those_of_the_whole_matrix(monkeypatch, kind, held):
    monkeypatch.setattr(pairs, "_HELD_LOGITS", held)  # 20: one to two rows at a time
    objective = build_objective(ObjectiveConfig(kind), 6)
    sizes = [(5, 4), (5, 0), (5, 5)]
    leaves = [
        ImageTextOutputs(*(x.requires_grad_() for x in random_outputs(n, seed)))
        for seed, (n, _) in enumerate(sizes)
    ]
    batches = [pack_of(*size) for size in sizes]
    losses = objective.join(leaves, batches)
    values = [loss.loss_sum(o, b) for loss, o, b in zip(losses, leaves, batches, strict=True)]
    sum(values).backward()

    twins = [ImageTextOutputs(*(x.detach().requires_grad_() for x in o)) for o in leaves]
    images = torch.cat([o.images[:used] for o, (_, used) in zip(twins, sizes, strict=True)])
    texts = torch.cat([o.texts[:used] for o, (_, used) in zip(twins, sizes, strict=True)])
    # Each pack has scale and bias as outputs of its own; together they are one parameter.
    scale, bias = (sum(o[i] for o in twins) / len(twins) for i in (2, 3))
    wanted = definition(kind, images, texts, scale, bias)
    wanted.sum().backward()
    assert [value.item() for value in values] == pytest.approx(
        [wanted[:4].sum().item(), 0.0, wanted[4:].sum().item()], rel=1e-6
    )
    for output, twin in zip(leaves, twins, strict=True):
        for ours, theirs in zip(output, twin, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_pair_and_one_pair_are_batches_too(kind):
    objective = build_objective(ObjectiveConfig(kind), 6)
    for used, wanted in ((0, 0.0), (1, None)):
        outputs = ImageTextOutputs(*(x.requires_grad_() for x in random_outputs(3)))
        (loss,) = objective.join([outputs], [pack_of(3, used)])
        value = loss.loss_sum(outputs, None)
        value.backward()
        if wanted is None:
            wanted = definition(kind, *(x[:1] if x.ndim else x for x in outputs)).sum().item()
        assert value.item() == pytest.approx(wanted, abs=1e-6)
        assert outputs.images.grad.isfinite().all()
        assert (outputs.images.grad[used:] == 0).all()


def test_extreme_logits_give_finite_losses_and_gradients():
    for kind in KINDS:
        outputs = random_outputs(4, scale=100.0, bias=-100.0 if kind == "siglip" else 0.0)
        result = build_objective(ObjectiveConfig(kind), 6).pair_loss(outputs)
        assert result.losses_n.isfinite().all()
        assert all(part.isfinite().all() for part in result.gradient)


def test_at_its_limit_the_scale_is_pushed_down_only():
    objective = build_objective(ObjectiveConfig("clip"), 6)
    alike = F.normalize(torch.ones(4, 6) + 0.1 * random_outputs(4).images)
    # Of texts so much alike a larger scale would fit better still.
    right = ImageTextOutputs(alike, alike, torch.tensor(100.0), torch.tensor(0.0))
    assert objective.pair_loss(right).gradient.scale < -1e-3
    (loss,) = objective.join([right], [pack_of(4, 4)])
    assert loss.gradient.scale == 0
    wrong = right._replace(texts=right.images.flip(0))
    (loss,) = objective.join([wrong], [pack_of(4, 4)])
    assert loss.gradient.scale > 0


def test_recall_counts_partners_among_the_best_k_and_ties_as_chance():
    images = torch.eye(4)
    texts = torch.eye(4)[[0, 1, 3, 2]]  # the last two are swapped
    recall = recall_of(unscaled(images, texts), within=(1, 4))
    assert recall["image_to_text_recall1"] == 0.5
    assert recall["image_to_text_recall4"] == 1.0
    assert recall["text_to_image_recall1"] == 0.5
    collapsed = recall_of(unscaled(torch.ones(8, 3), torch.ones(8, 3)))
    assert collapsed == {
        "image_to_text_recall1": 0.125,
        "image_to_text_recall5": 0.625,
        "text_to_image_recall1": 0.125,
        "text_to_image_recall5": 0.625,
    }


def test_recall_equals_a_sort_of_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(pairs, "_HELD_LOGITS", 100)
    outputs = random_outputs(60, dim=3)
    recall = recall_of(outputs)
    for name, logits in (
        ("image_to_text", outputs.images @ outputs.texts.T),
        ("text_to_image", outputs.texts @ outputs.images.T),
    ):
        order = logits.argsort(1, descending=True)
        place = (order == torch.arange(60)[:, None]).float().argmax(1)
        for k in (1, 5):
            assert recall[f"{name}_recall{k}"] == pytest.approx((place < k).float().mean().item())


@pytest.mark.parametrize("kind", KINDS)
def test_the_tally_of_held_out_packs_is_that_of_one_pack(kind):
    objective = build_objective(ObjectiveConfig(kind), 6)
    outputs = random_outputs(9)
    tally = objective.tally()
    for part in (slice(0, 2), slice(2, 9)):
        piece = outputs._replace(images=outputs.images[part], texts=outputs.texts[part])
        tally.add(piece, pack_of(len(piece.images), len(piece.images)))
    tally.add(outputs, pack_of(9, 0))
    metrics = tally.metrics()
    wanted = definition(kind, *outputs).mean().item()
    assert metrics.pop("images") == 9
    assert metrics.pop("loss") == pytest.approx(wanted, rel=1e-6)
    assert metrics == pytest.approx(recall_of(outputs))
    empty = objective.tally()
    empty.add(outputs, pack_of(9, 0))
    assert empty.metrics() == {"images": 0.0}


def test_each_objective_is_of_one_kind():
    for kind in ("softmax", "sigmoid"):
        objective = build_objective(ObjectiveConfig(kind), 5)
        assert isinstance(objective, PackObjective)
        assert not isinstance(objective, JointObjective)
    for kind in KINDS:
        objective = build_objective(ObjectiveConfig(kind), 5)
        assert isinstance(objective, JointObjective)
        assert not isinstance(objective, PackObjective)


PEAK = """
import sys
import torch
from tests.zeta.objectives.test_image_text import random_outputs
from zeta.objectives import build_objective
from zeta.objectives.config import ObjectiveConfig
from zeta.objectives.pairs import retrieval_hits

torch.set_num_threads(1)
outputs = random_outputs(int(sys.argv[2]), dim=16)
loss = build_objective(ObjectiveConfig(sys.argv[1]), 16).pair_loss
loss(random_outputs(8, dim=16))
def status(name):
    return int(open("/proc/self/status").read().split(name)[1].split()[0]) / 1024
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
before = status("VmRSS:")
loss(outputs)
retrieval_hits(outputs, (1, 5))
print(status("VmHWM:") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_square_of_the_pairs(kind):
    # One matrix of 12288 x 12288 logits takes 576 MiB, and a gradient takes several; 84 were seen.
    command = [sys.executable, "-c", PEAK, kind, "12288"]
    # Unless told where large blocks begin, malloc learns it, and keeps some of those it was given
    # back: 100 to 306 MiB were seen for the same work.
    fixed = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=fixed)
    assert float(done.stdout) < 144
