"""The masked autoencoder of docs/extending.md: what it sees and predicts, and that it trains."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.shards.build import build_shards
from launch.recipes.digits import CLASS_NAMES, render_split
from tests.launch.command_line import zeta
from tests.zeta.foreign_reconstruction import MaskedPatches, Reconstruction
from tests.zeta.objectives.distill_jobs import dropped_pack
from tests.zeta.objectives.test_whole_images import dropping_pack, pictures
from tests.zeta.training import ROOT, lane_pack, tiny_navit
from zeta.models.config import load_pretrained
from zeta.models.parameters import parameter_rules
from zeta.objectives.config import ObjectiveConfig
from zeta.packed import join_packs

KIND = "tests.zeta.foreign_reconstruction:MaskedPatches"


def model():
    return Reconstruction(tiny_navit(num_classes=1, pool="mean"), dim=16).eval()


def objective():
    return MaskedPatches(ObjectiveConfig(KIND), 1)


def loss(predicted, pack):
    return float(objective().loss_sum(predicted, pack))


def test_the_example_has_less_than_150_lines():
    assert len(Path(ROOT, "tests/zeta/foreign_reconstruction.py").read_text().splitlines()) < 150


def test_its_token_never_decays_and_its_matrices_do():
    rules = parameter_rules(model())
    assert rules["decoder.mask_token"].group == "none"
    assert rules["decoder.pixels.weight"].group == rules["decoder.narrow.weight"].group == "body"


@torch.no_grad()
def test_the_targets_are_the_normalised_pixels_of_the_dropped_patches_averaged_by_image():
    pack = dropping_pack(pictures())  # of the third image nothing is dropped
    pixels = pack.dropped_patches.float() / 255
    target = (pixels - pixels.mean(1, keepdim=True)) / pixels.std(1, correction=0, keepdim=True)
    assert loss(target, pack) == pytest.approx(0, abs=1e-4)
    assert loss(target + 1, pack) == pytest.approx(2, rel=1e-2)  # 1 for each image that has a part
    wrong = target + 2 * (pack.dropped_image == 0)[:, None] * (pack.dropped_coords[:, :1] == 0)
    share = ((pack.dropped_image == 0) & (pack.dropped_coords[:, 0] == 0)).sum()
    share = share / (pack.dropped_image == 0).sum()
    assert loss(wrong, pack) == pytest.approx(4 * float(share), rel=1e-2)


@torch.no_grad()
def test_predictions_are_the_same_in_any_pack():
    packs = [dropped_pack(1, lane) for lane in (1, 2, 3)]
    trained, joined = model(), join_packs(packs, "cpu")
    alone = [trained(pack) for pack in packs]
    assert sum(map(len, alone)) > 5
    together = trained(joined)
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    parts = [loss(out, pack) for out, pack in zip(alone, packs, strict=True)]
    assert loss(together, joined) == pytest.approx(sum(parts))


@torch.no_grad()
def test_dropped_pixels_reach_the_targets_alone_and_kept_ones_and_places_the_prediction():
    pack, trained = dropping_pack(pictures()), model()
    before = trained(pack)
    inverted = replace(pack, dropped_patches=255 - pack.dropped_patches)
    assert torch.equal(before, trained(inverted))
    assert loss(before, inverted) != pytest.approx(loss(before, pack))
    assert not torch.allclose(before, trained(replace(pack, patches=255 - pack.patches)))
    moved = replace(pack, dropped_coords=pack.dropped_coords.flip(1))
    assert not torch.allclose(before, trained(moved))


@torch.no_grad()
def test_an_image_sees_nothing_of_the_others():
    pack, trained = dropping_pack(pictures()), model()
    patches = pack.patches.clone()
    patches[pack.lengths[0] :] = 255 - patches[pack.lengths[0] :]
    before, after = trained(pack), trained(replace(pack, patches=patches))
    first = pack.dropped_image == 0
    torch.testing.assert_close(after[first], before[first], rtol=0, atol=1e-6)
    assert not torch.allclose(after[~first], before[~first])


@pytest.mark.parametrize("held_out", [True, False])
def test_images_with_nothing_dropped_cost_nothing_and_leave_every_gradient_zero(held_out):
    pack = lane_pack(1, 2, images=3)
    if not held_out:  # a pack of training in which nothing was dropped
        pack = replace(
            pack,
            dropped_patches=pack.patches[:0],
            dropped_coords=pack.coords[:0],
            dropped_image=torch.zeros(0, dtype=torch.int64),
        )
    trained = model().train()
    predicted = trained(pack)
    total = objective().loss_sum(predicted, pack)
    assert len(predicted) == 0
    assert float(total.detach()) == 0
    total.backward()
    for name, parameter in trained.named_parameters():
        learns = parameter.requires_grad
        assert not learns or float(parameter.grad.abs().sum()) == 0, name


@torch.no_grad()
def test_images_without_weight_cost_nothing():
    pack, trained = dropping_pack(pictures()), model()
    out = trained(pack)
    assert loss(out, replace(pack, weights=torch.zeros_like(pack.weights))) == 0
    parts = torch.eye(len(pack.weights)).unbind()
    losses = [loss(out, replace(pack, weights=part)) for part in parts]
    assert losses[2] == losses[3] == 0  # nothing dropped, and unused
    assert loss(out, pack) == pytest.approx(sum(losses))


def test_a_pooling_that_would_not_learn_is_refused():
    class Attention:
        @staticmethod
        def build(config, seed):
            return tiny_navit()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.zeta.foreign_reconstruction.build_model", Attention.build)
        with pytest.raises(ValueError, match=r"needs model\.pool=mean"):
            MaskedPatches.build_model(None, ObjectiveConfig(KIND), 0)


@pytest.mark.slow
def test_ranks_and_stages_learn_as_one_process_does(ranks, tmp_path):
    found = {}
    for world_size, cases in {1: [(0, 1), (0, 4)], 2: [(2, 1), (3, 2)]}.items():
        out = tmp_path / f"{world_size}.json"
        arguments = {"packs_per_step": 4, "cases": cases, "out": str(out)}
        ranks.run("tests.zeta.objectives.distill_jobs.reconstructing", world_size, arguments)
        found |= json.loads(out.read_text())
    wanted = torch.tensor(found.pop("stage 0, 1 packs"))
    assert set(found) == {"stage 0, 4 packs", "stage 2, 1 packs", "stage 3, 2 packs"}
    for case in found.values():
        torch.testing.assert_close(torch.tensor(case), wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_it_trains_on_two_ranks_is_probed_and_its_encoder_is_exported(tmp_path):
    train = [sample for sample, _ in zip(render_split("train", seed=0), range(120), strict=False)]
    bare = [(key, {"jpg": files["jpg"]}) for key, files in train]
    build_shards(bare, tmp_path / "bare")
    build_shards(train[:80], tmp_path / "train", class_names=CLASS_NAMES)
    build_shards(train[80:], tmp_path / "val", class_names=CLASS_NAMES)
    settings = (
        *(f"objective.kind={KIND}", "objective.label_smoothing=0", "model.pool=mean"),
        *("data.drop.kind=constant", "data.drop.rate=0.75", "data.drop.keep=true"),
        *("data.shards=bare", "data.val_shards=val", "data.probe_shards=train", "data.workers=0"),
        *("train.evaluate.knn=true", "train.max_steps=24", "train.log_every=6"),
        *("optim.warmup_steps=2", "train.device=cpu", "tracker.wandb.mode=disabled"),
    )
    for ranks, run in ((1, "one"), (2, "two")):
        words = ("launch", "local", "demo", f"run.dir={run}", f"--nproc={ranks}", *settings)
        done = zeta(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr + done.stdout
    one, two = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    )
    losses, other = ([r["train/loss"] for r in run if "train/loss" in r] for run in (one, two))
    assert losses[-1] < 0.98 * losses[0]
    assert other == pytest.approx(losses, rel=1e-3)
    scores = next(line for line in one if "val/images" in line)
    assert scores["val/images"] == 40
    assert "val/loss" not in scores
    assert 0 <= scores["val/knn_top1"] <= 1
    assert zeta("export", "one", "export", cwd=tmp_path).returncode == 0
    assert load_pretrained(tmp_path / "export").pool == "mean"
    refused = zeta("train", "demo", "run.dir=x", *settings, "data.drop.keep=false", cwd=tmp_path)
    assert refused.returncode != 0
    assert "data.drop.keep" in refused.stderr
