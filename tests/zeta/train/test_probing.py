"""Probes while training: what they say, and that training does not notice them."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from tests.zeta.train.test_evaluation_schedule import _newest, _run_with
from tests.zeta.train.test_trainer import JOB, _lines, _losses, _run
from tests.zeta.training import NUM_CLASSES, SyntheticSource, tiny_navit
from zeta.checkpoint.directory import load_full_weights
from zeta.distributed import RankInfo, World
from zeta.exit_codes import ExitCode, RunError
from zeta.objectives.view_model import ViewModel
from zeta.probes.classifiers import CLASSIFIERS, hit_rates
from zeta.run.directory import RunDir
from zeta.run.watchdog import Unwatched
from zeta.train.evaluation import HeldOut
from zeta.train.probing.encoder import encoder_of
from zeta.train.probing.rounds import ProbeRounds
from zeta.train.probing.scores import ProbeImages, ProbeScores, probe_scores

ALONE = World(RankInfo(), torch.device("cpu"))


def part(steps, reject_at=()):
    return HeldOut(
        None, 200, 0, str(steps), lambda: SyntheticSource(0, 1, 5, steps, reject_at=reject_at)
    )


def images(**changes):
    given = {"train": part(12), "test": part(3), "num_classes": NUM_CLASSES}
    return ProbeImages(**(given | {"classifiers": ("knn", "linear_probe")} | changes))


def embeddings(steps, embed):
    """Features and labels of all images of a part, pack by pack."""
    source, features, labels = SyntheticSource(0, 1, 5, steps), [], []
    for step in range(steps):
        for pack in source._packs(step).packs:
            if pack.num_tokens:
                features.append(embed(pack)[pack.weights > 0])
                labels.append(pack.labels[pack.weights > 0])
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def test_the_scores_are_those_of_the_classifiers_on_the_embeddings_of_all_images():
    embed = tiny_navit().eval().forward_embeddings
    found = probe_scores(embed, images(), ALONE)
    (train, labels), (test, truth) = embeddings(12, embed), embeddings(3, embed)
    for name, score in (("knn", "knn_top1"), ("linear_probe", "probe_top1")):
        with torch.enable_grad():
            expected = hit_rates(CLASSIFIERS[name](train, labels, test, NUM_CLASSES), truth)["top1"]
        assert found.scores[score] == pytest.approx(expected, abs=1e-9)


def test_embeddings_that_are_not_finite_are_told_by_their_part_instead_of_scored():
    model = tiny_navit().eval()

    def embed(pack):
        made = model.forward_embeddings(pack)
        bad = pack.sample_ids == 100  # step 0, lane 1
        return torch.where(bad[:, None], torch.nan, made)

    with torch.no_grad():
        found = probe_scores(embed, images(names=("data.shards", "data.val_shards")), ALONE)
    assert not found.scores
    assert found.fault.startswith("the embeddings of 1 of ")
    for key in ("data.shards", "data.val_shards"):
        assert f"images of {key} are not finite" in found.fault


def test_images_that_cannot_be_decoded_are_returned_and_a_part_without_any_is_named():
    embed = tiny_navit().eval().forward_embeddings
    with torch.no_grad():
        parts = images(test=part(3, reject_at=(1,)), classifiers=("knn",))
        found = probe_scores(embed, parts, ALONE)
        assert isinstance(found, ProbeScores)
        assert [item.key for item in found.rejected] == ["key7"]
        with pytest.raises(RunError, match=r"none of the 0 data\.probe_val_shards images"):
            probe_scores(embed, images(test=part(0)), ALONE)


@torch.no_grad()
def test_a_stop_ends_a_probe_between_two_packs():
    asked = iter([None] * 4)
    embed = tiny_navit().eval().forward_embeddings

    def requested():
        return next(asked, ExitCode.REQUEUE)

    assert probe_scores(embed, images(), ALONE, requested=requested) is ExitCode.REQUEUE


def test_the_encoder_is_found_where_the_objective_says():
    image = tiny_navit(num_classes=1)
    model = ViewModel(image, hidden=8, dim=4)
    assert encoder_of(model, "image.") is image
    assert encoder_of(image, "") is image
    for prefix in ("", "text.", "projector."):
        with pytest.raises(ValueError, match=r"model of the objective \(ViewModel\) has none"):
            encoder_of(model, prefix)


class StillEngine:
    """A model that does not train, with an average of its weights that is not finite."""

    world, average = ALONE, object()

    def __init__(self):
        self.module = tiny_navit().eval()

    @contextmanager
    def embedding(self, encoder, *, average=False):
        assert encoder is self.module
        with torch.no_grad():
            yield lambda pack: encoder.forward_embeddings(pack) / (not average)


class Messages:
    """A console that keeps what it is told."""

    def __init__(self):
        self.told = []

    def message(self, text):
        self.told.append(text)

    def evaluating(self, done, of):
        assert 0 <= done <= of


@pytest.mark.slow
def test_a_round_without_finite_embeddings_is_told_and_has_no_scores():
    console, signals = Messages(), SimpleNamespace(requested=None)
    parts = images(test=part(3, reject_at=(1,)), classifiers=("knn",))
    rounds = ProbeRounds(parts, 5, StillEngine(), console, Unwatched())
    for step in (5, 10):
        found = rounds.run(step, signals)
        assert set(found.metrics) == {"val/knn_top1"}
        assert set(found.shown) == {"k-NN"}
    said = [text for text in console.told if "has no scores of the probes of average" in text]
    assert [text.partition(" has")[0] for text in said] == ["WARNING: step 5", "WARNING: step 10"]
    assert "data.probe_shards are not finite" in said[0]
    rejected = [text for text in console.told if "could not be used" in text]
    assert rejected == [
        "1 images of the probes could not be used, the last was key7 in shard.tar: truncated"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_training_is_bitwise_the_same_with_and_without_probes(ranks, tmp_path, stage):
    with_it, without = tmp_path / "with", tmp_path / "without"
    probed = _run_with(with_it, every=2, stage=stage, held_out={}, probe={"steps": 12})
    ranks.run(JOB, 2, {"runs": [probed, _run(without, stage=stage)]})
    scores = [line for line in _lines(RunDir(with_it).metrics) if "val/knn_top1" in line]
    assert [line["step"] for line in scores] == [2, 4, 6, 8]
    assert _losses(with_it) == _losses(without)
    for average in (False, True):
        ours, theirs = (
            load_full_weights(_newest(run), average=average) for run in (with_it, without)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    model = tiny_navit(dropout=0.1).eval()
    model.load_state_dict(load_full_weights(_newest(with_it)))
    with torch.no_grad():
        alone = probe_scores(model.forward_embeddings, images(), ALONE)
    for name in ("knn_top1", "probe_top1"):
        assert scores[-1][f"val/{name}"] == pytest.approx(alone.scores[name], abs=1e-9)
    progress = json.loads((_newest(with_it) / "trainer.json").read_text())["progress"]
    assert (progress["validated_step"], progress["best_value"]) == (8, None)
