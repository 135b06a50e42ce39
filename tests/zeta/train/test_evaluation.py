"""Evaluation on held-out packs: exact on any number of ranks, stoppable, and without a trace."""

import json

import pytest
import torch

from tests.zeta.training import NUM_CLASSES, SyntheticSource, lane_pack, tiny_navit
from zeta.distributed import RankInfo, World
from zeta.exit_codes import ExitCode, RunError
from zeta.objectives import build_objective
from zeta.objectives.config import ObjectiveConfig
from zeta.train.evaluation import evaluate

LANES, STEPS = 5, 3


def _objective(**options):
    return build_objective(ObjectiveConfig(**options), NUM_CLASSES)


def _alone(source, objective=None, **options):
    world = World(RankInfo(), torch.device("cpu"))
    return evaluate(tiny_navit().eval(), objective or _objective(), source, world, **options)


def _expected():
    """Loss and top-1 of the packs, image by image."""
    model, losses, hits = tiny_navit().eval(), [], 0
    with torch.no_grad():
        for step in range(STEPS):
            for lane in range(LANES):
                pack = lane_pack(step, lane)
                rows = pack.weights > 0
                logits = model(pack)[rows]
                labels = pack.labels[rows]
                losses += torch.nn.functional.cross_entropy(logits, labels, reduction="none")
                hits += int((logits.argmax(1) == labels).sum())
    return {"loss": float(sum(losses)) / len(losses), "top1": hits / len(losses)}, len(losses)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_every_image_counts_once_and_the_loss_is_that_of_the_true_labels(smoothing):
    scores, images = _expected()
    source = SyntheticSource(0, 1, LANES, epoch_steps=STEPS)
    found = _alone(source, _objective(label_smoothing=smoothing))
    assert found.images == images
    assert found.scores["loss"] == pytest.approx(scores["loss"], rel=1e-6)
    assert found.scores["top1"] == scores["top1"] <= found.scores["top5"] == 1  # of 5 classes


def test_images_that_cannot_be_decoded_are_returned_with_their_reasons():
    source = SyntheticSource(0, 1, LANES, epoch_steps=STEPS, reject_at=(1,))
    found = _alone(source)
    assert found.images == _expected()[1] - 1
    assert found.rejected == 1
    assert [(item.key, item.reason) for item in found.rejected_here] == [("key7", "truncated")]


def test_it_shows_how_far_it_is():
    shown = []
    found = _alone(SyntheticSource(0, 1, LANES, epoch_steps=STEPS), show=shown.append)
    assert shown == sorted(shown)
    assert shown[-1] == found.images


def test_a_stop_is_heeded_between_two_packs():
    seen = []

    def requested():
        return ExitCode.REQUEUE if len(seen) == 3 else None

    source = SyntheticSource(0, 1, LANES, epoch_steps=STEPS)
    stopped = _alone(source, requested=requested, show=seen.append)
    assert stopped is ExitCode.REQUEUE
    assert len(seen) == 3


def test_a_set_without_a_usable_image_is_an_error_and_no_score():
    with pytest.raises(RunError, match="none of the 0 held-out images"):
        _alone(SyntheticSource(0, 1, LANES, epoch_steps=0))


JOB = "tests.zeta.evaluation_jobs.scores"


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_scores_are_the_same_on_any_number_of_ranks_and_stage(ranks, tmp_path, world_size):
    out = tmp_path / "out.json"
    ranks.run(JOB, world_size, {"out": str(out), "lanes": LANES, "steps": STEPS})
    scores, images = _expected()
    reports = json.loads(out.read_text())
    assert set(reports) == {f"stage {stage}" for stage in range(4)} | {"one lane has all", "bf16"}
    for case, found in reports.items():
        assert found["images"] == (images if case != "one lane has all" else found["lane images"])
        if case.startswith("stage"):
            assert found["loss"] == pytest.approx(scores["loss"], rel=1e-6), case
            assert found["top1"] == scores["top1"], case
        if case == "bf16":
            assert found["loss"] == pytest.approx(scores["loss"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("error", ["OSError", "RunError"])
def test_a_shard_that_one_rank_cannot_read_ends_all_ranks(ranks, tmp_path, error):
    job = "tests.zeta.evaluation_jobs.failure"
    codes, outputs = ranks.start(job, 3, {"error": error}, grace=20.0)
    assert codes == [0, 0, 0], outputs
    assert "OSError" in outputs[1] if error == "OSError" else "RunError" in outputs[1]
    assert "rank 1: no such shard" in outputs[0]
