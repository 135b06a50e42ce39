"""The loss and gradient of a distillation are those of its definition, in any packs and ranks."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from tests.zeta.objectives.distill_jobs import built, dropped_pack
from zeta.models.resizing import resize
from zeta.objectives import JointObjective, PackObjective
from zeta.packed import join_packs

LANES = range(1, 5)


def whole_pictures(pack):
    """The images of a pack, of all their patches."""
    for image, (h, w) in enumerate(pack.grids.tolist()):
        pixels = torch.zeros(h, w, 16, dtype=torch.uint8)
        start, stop = pack.cu_seqlens[image : image + 2].tolist()
        for coords, patches in (
            (pack.coords[start:stop], pack.patches[start:stop]),
            (
                pack.dropped_coords[pack.dropped_image == image],
                pack.dropped_patches[pack.dropped_image == image],
            ),
        ):
            pixels[coords[:, 0].long(), coords[:, 1].long()] = patches
        if stop > start:
            yield image, pixels.view(h, w, 4, 4).permute(0, 2, 1, 3).reshape(1, 4 * h, 4 * w)


def definition(model, objective, packs, loss):
    """The sum of the losses of all images, each by itself, as the text of `DistillConfig` says."""
    config, expert = objective.config, objective.teacher
    total = torch.zeros(())

    def distance(found, wanted):
        if loss == "cosine":
            unit = [x / x.norm(dim=-1, keepdim=True) for x in (found, wanted)]
            return 1 - (unit[0] * unit[1]).sum(-1)
        wanted = (wanted - wanted.mean(-1, keepdim=True)) / (
            wanted.var(-1, keepdim=True, correction=0) + 1e-5
        ).sqrt()
        return F.smooth_l1_loss(found, wanted, reduction="none").mean(-1)

    for pack in packs:
        outputs = model(pack)
        for image, pixels in whole_pictures(pack):
            if pack.weights[image] == 0:
                continue
            side = expert.encoder.patch_size
            rows, columns = (max(1, round(n / side)) for n in pixels.shape[1:])
            resized = resize(pixels.permute(1, 2, 0).numpy(), (rows * side, columns * side))
            pixels = torch.from_numpy(resized).permute(2, 0, 1)
            pooled, tokens = expert.encoder.forward_both([pixels])
            features = tokens.features[tokens.coords[:, 0] >= 0].T.reshape(1, -1, rows, columns)
            h, w = pack.grids[image].tolist()
            # Of a grid of h x w points at the centres of the student's patches.
            wanted = F.interpolate(features, (h, w), mode="bilinear", align_corners=False)[0]
            own = slice(*pack.cu_seqlens[image : image + 2].tolist())
            y, x = pack.coords[own].long().unbind(1)
            at_tokens = distance(outputs.tokens[own], wanted[:, y, x].T).mean()
            total = total + config.pooled * distance(outputs.pooled[image], pooled[0])
            total = total + config.tokens * at_tokens
    return total


@pytest.mark.parametrize("loss", ["cosine", "smooth_l1"])
def test_the_loss_and_its_gradient_are_those_of_the_definition(loss):
    model, objective = built("distill", loss=loss)
    packs = [dropped_pack(0, lane) for lane in LANES]
    wanted = definition(model, objective, packs, loss)
    learning = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(wanted, learning)
    for given in (packs, [join_packs(packs, "cpu")]):
        found = sum(objective.loss_sum(model(pack), pack) for pack in given)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(found, learning)
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["softmax+distill", "sigmoid+distill"])
def test_added_to_classes_the_loss_is_the_sum_of_both(kind):
    model, objective = built(kind)
    pack = dropped_pack(0, 3)
    outputs = model(pack)
    both = objective.base.loss_sum(outputs.base, pack) + 2 * objective.distance(outputs, pack)
    torch.testing.assert_close(objective.loss_sum(outputs, pack), both)
    counts = objective.counts(outputs, pack)
    torch.testing.assert_close(counts["base_loss"] + 2 * counts["distill_loss"], both)
    assert set(counts) == {"top1", "base_loss", "distill_loss", "pooled_loss", "token_loss"}
    assert isinstance(objective, PackObjective)


def test_added_to_captions_the_loss_is_the_sum_of_both_over_all_pairs():
    model, objective = built("siglip+distill")
    packs = [dropped_pack(0, lane) for lane in LANES]
    outputs = [model(pack) for pack in packs]
    losses = objective.join(outputs, packs)
    found = sum(a.loss_sum(o, p) for a, o, p in zip(losses, outputs, packs, strict=True))
    pairs = objective.base.join([output.base for output in outputs], packs)
    wanted = sum(a.loss for a in pairs) + 2 * sum(map(objective.distance, outputs, packs))
    torch.testing.assert_close(found, wanted)
    assert isinstance(objective, JointObjective)
    assert not isinstance(objective, PackObjective)


def test_counts_after_a_loss_do_not_ask_the_teacher_again(monkeypatch):
    model, objective = built("distill")
    pack, calls = dropped_pack(0, 3), []
    expert = objective.teacher.forward
    monkeypatch.setattr(objective.teacher, "forward", lambda p: calls.append(1) or expert(p))
    outputs = model(pack)
    loss = objective.loss_sum(outputs, pack)
    counts = objective.counts(outputs, pack)
    torch.testing.assert_close(0.7 * counts["pooled_loss"] + 0.4 * counts["token_loss"], loss)
    assert calls == [1]
    assert objective.counts(outputs, pack) == counts
    assert calls == [1, 1]


@pytest.mark.parametrize(
    "kind", ["distill", "softmax+distill", "sigmoid+distill", "siglip+distill", "clip+distill"]
)
def test_held_out_images_get_the_loss_and_the_parts_that_training_has_by_the_same_names(kind):
    model, objective = built(kind)
    packs = [dropped_pack(0, lane) for lane in LANES]
    outputs = [model(pack) for pack in packs]
    tally, images = objective.tally(), sum(pack.num_images for pack in packs)
    for output, pack in zip(outputs, packs, strict=True):
        tally.add(output, pack)
    held_out = tally.metrics()
    joint = isinstance(objective, JointObjective)
    losses = objective.join(outputs, packs) if joint else [objective] * len(packs)
    training = {"loss": 0.0}
    for loss, output, pack in zip(losses, outputs, packs, strict=True):
        sums = {"loss": loss.loss_sum(output, pack), **loss.counts(output, pack)}
        for name, value in sums.items():
            training[name] = training.get(name, 0.0) + float(value.detach()) / images
    assert held_out["images"] == images
    names = {name for name in training if "loss" in name}
    assert names == {name for name in held_out if "loss" in name}
    for name in names:
        assert held_out[name] == pytest.approx(training[name], rel=1e-5)


def test_a_weight_of_zero_builds_no_map_and_no_part_of_the_loss():
    for name, other in (("pooled", "token_loss"), ("tokens", "pooled_loss")):
        model, objective = built("distill", **{name: 0.0})
        pack = dropped_pack(0, 3)
        assert getattr(model.maps, name) is None
        assert set(objective.counts(model(pack), pack)) == {other}


def test_the_teacher_never_learns_and_is_no_part_of_the_model():
    model, objective = built("distill")
    objective.place(torch.device("cpu"), torch.bfloat16)
    expert = objective.teacher.train()
    assert not any(module.training for module in expert.modules())
    assert not any(p.requires_grad for p in expert.parameters())
    assert expert.encoder.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    own = {id(module) for module in expert.modules()}
    assert not any(id(module) in own for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "loss"),
    [("distill", "cosine"), ("softmax+distill", "smooth_l1"), ("siglip+distill", "cosine")],
)
def test_ranks_stages_and_joining_change_nothing(ranks, tmp_path, kind, loss):
    cases = {
        1: [(0, 6), (0, 1)],
        2: [(0, 1), (1, 3), (2, 2), (3, 3)],
        3: [(2, 1), (3, 2)],
    }
    found = {}
    for world_size, of_world in cases.items():
        out = tmp_path / f"{world_size}.json"
        arguments = {"packs_per_step": 6, "cases": of_world, "out": str(out)}
        arguments |= {"kind": kind, "loss": loss}
        ranks.run("tests.zeta.objectives.distill_jobs.training", world_size, arguments)
        found |= {(world_size, k): v for k, v in json.loads(out.read_text()).items()}
    reference = found[1, "stage 0, 6 packs"]  # one process, the whole step in one batch
    assert reference["losses"][0] != reference["losses"][1]
    for case in found.values():
        for step, wanted in zip(case["losses"], reference["losses"], strict=True):
            assert step == pytest.approx(wanted, rel=1e-5)
        torch.testing.assert_close(
            torch.tensor(case["weights"]), torch.tensor(reference["weights"]), rtol=0, atol=1e-5
        )
