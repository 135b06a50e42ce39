"""The masked autoencoder of docs/extending.md: what it hides, what it sees, and that it trains."""

import json
from dataclasses import replace

import pytest
import torch

from data_pipeline.shards.build import build_shards
from launch.recipes.digits import CLASS_NAMES, render_split
from tests.launch.command_line import zeta
from tests.zeta.foreign_reconstruction import MASKED, MaskedPatches, Reconstruction, visible_part
from tests.zeta.training import lane_pack, tiny_navit
from zeta.models.config import load_pretrained
from zeta.objectives.config import ObjectiveConfig
from zeta.packed import join_packs

KIND = "tests.zeta.foreign_reconstruction:MaskedPatches"


def model():
    return Reconstruction(tiny_navit(num_classes=1, pool="mean"), dim=16).eval()


def objective():
    return MaskedPatches(ObjectiveConfig(KIND), 1)


def seeded_pack(step, lane, images=4):
    pack = lane_pack(step, lane, images=images)
    return replace(pack, draw_seeds=torch.arange(len(pack.weights), dtype=torch.int32) + 10 * lane)


def test_the_share_of_each_image_is_hidden_and_what_is_seen_are_its_patches():
    pack = seeded_pack(1, 2)
    rows, seen = visible_part(pack, training=True)
    assert seen.lengths[-1] == 0
    for length, kept in zip(pack.lengths[:-1], seen.lengths[:-1], strict=True):
        assert kept == min(length, max(1, round((1 - MASKED) * length)))
    assert torch.equal(seen.patches, pack.patches[rows])
    assert torch.equal(seen.coords, pack.coords[rows])
    assert len(set(rows.tolist())) == len(rows)
    starts = pack.cu_seqlens.tolist()
    for image, (first, stop) in enumerate(
        zip(seen.cu_seqlens[:-2], seen.cu_seqlens[1:-1], strict=True)
    ):
        own = rows[first:stop].tolist()
        assert all(starts[image] <= row < starts[image + 1] for row in own)


def test_other_seeds_hide_other_patches_and_an_evaluation_always_the_same():
    pack = seeded_pack(1, 2)
    other = replace(pack, draw_seeds=pack.draw_seeds + 77)
    first, second = (visible_part(p, training=True)[0] for p in (pack, other))
    assert not torch.equal(first, second)
    first, second = (visible_part(p, training=False)[0] for p in (pack, other))
    assert torch.equal(first, second)


@torch.no_grad()
def test_predictions_are_the_same_in_any_pack():
    packs = [seeded_pack(1, lane) for lane in (1, 2)]
    trained = model()
    joined = trained(join_packs(packs, "cpu"))
    alone = [trained(pack) for pack in packs]
    used = [pack.num_tokens for pack in packs]
    expected = torch.cat([out.predicted[:n] for out, n in zip(alone, used, strict=True)])
    assert torch.allclose(joined.predicted[: sum(used)], expected, atol=1e-5)
    masked = torch.cat([out.masked[:n] for out, n in zip(alone, used, strict=True)])
    assert torch.equal(joined.masked[: sum(used)], masked)
    loss = sum(float(objective().loss_sum(o, p)) for o, p in zip(alone, packs, strict=True))
    assert float(objective().loss_sum(joined, join_packs(packs, "cpu"))) == pytest.approx(loss)


@torch.no_grad()
def test_nothing_of_a_hidden_patch_reaches_the_predictions():
    pack, trained = seeded_pack(1, 2), model()
    before = trained(pack)
    changed = torch.where(before.masked[:, None], 255 - pack.patches, pack.patches)
    after = trained(replace(pack, patches=changed))
    assert torch.equal(before.predicted, after.predicted)
    seen = torch.where(before.masked[:, None], pack.patches, 255 - pack.patches)
    assert not torch.allclose(before.predicted, trained(replace(pack, patches=seen)).predicted)


@torch.no_grad()
def test_padding_and_images_without_weight_cost_nothing():
    pack, trained = seeded_pack(1, 2), model()
    out = trained(pack)
    assert not out.masked[pack.num_tokens :].any()
    without = replace(pack, weights=torch.zeros_like(pack.weights))
    assert float(objective().loss_sum(out, without)) == 0
    parts = torch.eye(len(pack.weights)).unbind()
    losses = [float(objective().loss_sum(out, replace(pack, weights=part))) for part in parts]
    assert float(objective().loss_sum(out, pack)) == pytest.approx(sum(losses))


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
def test_it_trains_on_two_ranks_is_probed_and_its_encoder_is_exported(tmp_path):
    train = [sample for sample, _ in zip(render_split("train", seed=0), range(120), strict=False)]
    bare = [(key, {"jpg": files["jpg"]}) for key, files in train]
    build_shards(bare, tmp_path / "bare")
    build_shards(train[:80], tmp_path / "train", class_names=CLASS_NAMES)
    build_shards(train[80:], tmp_path / "val", class_names=CLASS_NAMES)
    settings = (
        *(f"objective.kind={KIND}", "objective.label_smoothing=0", "model.pool=mean"),
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
    scores = next(line for line in one if "val/loss" in line)
    assert 0 < scores["val/loss"] < 1.5
    assert 0 <= scores["val/knn_top1"] <= 1
    assert zeta("export", "one", "export", cwd=tmp_path).returncode == 0
    assert load_pretrained(tmp_path / "export").pool == "mean"
