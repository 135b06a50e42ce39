"""Accuracy of k-NN and of a linear probe on the pooled embeddings of the encoder that trains.

All ranks compute the embeddings; rank 0 classifies them, on its device, and tells the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zeta.distributed import World
from zeta.exit_codes import ExitCode
from zeta.objectives.embedding_spread import embedding_spread
from zeta.packed import PackedBatch, Rejected
from zeta.probes.classifiers import CLASSIFIERS, hit_rates, not_finite
from zeta.probes.feature_rows import FeatureRows
from zeta.train.evaluation import HeldOut, evaluate

SCORES = {"knn": "knn_top1", "linear_probe": "probe_top1"}
"""Names of the scores, by classifier."""
CLASSIFIER_WORDS = {"knn": "k-NN", "linear_probe": "linear probe"}
"""Display names of the classifiers."""


@dataclass(frozen=True)
class ProbeImages:
    """The labelled images of the probes, with classes that both parts number alike."""

    train: HeldOut
    """Images whose embeddings the classifiers learn from."""
    test: HeldOut
    """Images that they classify."""
    num_classes: int
    classifiers: tuple[str, ...]
    """Names in `zeta.probes.classifiers.CLASSIFIERS`."""
    encoder: str = ""
    """Prefix of the encoder's parameters in the model (`DeclaredObjective.encoder`)."""
    names: tuple[str, str] = ("data.probe_shards", "data.probe_val_shards")
    """Config keys of the two parts, for messages."""

    @property
    def images(self) -> int:
        """Number of images of both parts."""
        return self.train.images + self.test.images


@dataclass(frozen=True)
class ProbeScores:
    """The result of one probe, the same on every rank."""

    scores: Mapping[str, float]
    """Shares in [0, 1] of the held-out images by the names in `SCORES`; empty with a `fault`."""
    spread: Mapping[str, float]
    """How the embeddings of the held-out images are spread, see `embedding_spread`; likewise."""
    rejected: tuple[Rejected, ...]
    """Images of both parts, of all ranks, that could not be decoded."""
    fault: str = ""
    """Why there are no scores."""


def probe_scores(
    embed: Callable[[PackedBatch], Tensor],
    images: ProbeImages,
    world: World,
    *,
    requested: Callable[[], ExitCode | None] = lambda: None,
    show: Callable[[int], None] = lambda images: None,
) -> ProbeScores | ExitCode:
    """Classify the held-out part by the embeddings of both; every rank calls this.

    Args:
        embed: returns the pooled embeddings [I, dim] of a pack on the device.
        images: the two parts.
        world: the ranks.
        requested: returns the exit code if this rank was asked to stop, else None.
        show: called with the number of images that all ranks have embedded so far.

    Returns:
        The scores, or the exit code if a rank was asked to stop before the end.

    Raises:
        RunError: no image of a part could be decoded.
        OSError, RuntimeError: a shard could not be read, on this rank or on another one.
    """
    parts, rejected, before = list[FeatureRows](), list[Rejected](), 0
    for part, name in zip((images.train, images.test), images.names, strict=True):

        def shown(done: int, before: int = before) -> None:
            show(before + done)

        rows = FeatureRows(world)
        found = evaluate(
            embed, rows, part.open(), world, requested=requested, show=shown, what=f"{name} images"
        )
        if isinstance(found, ExitCode):
            return found
        parts.append(rows)
        rejected += [item for rank in world.gather(found.rejected_here) for item in rank]
        before += part.images
    faults = [_fault(rows, name) for rows, name in zip(parts, images.names, strict=True)]
    if fault := " and ".join(filter(None, faults)):
        return ProbeScores({}, {}, tuple(rejected), fault)
    scores, spread = _on_rank_0(parts, images, world)
    return ProbeScores(scores, spread, tuple(rejected))


def _fault(rows: FeatureRows, name: str) -> str:
    """Return which embeddings are not finite, in words; "" if all are."""
    features = torch.from_numpy(rows.rows["feature"])
    return not_finite(features, rows.rows["key"].tolist(), f"of {name}")


def _on_rank_0(
    parts: list[FeatureRows], images: ProbeImages, world: World
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the scores and the spread that rank 0 finds, on every rank. NOTE: a collective."""
    found: tuple[dict[str, float], dict[str, float]] = {}, {}
    failure = None
    if world.is_main:
        try:
            found = _classify(parts, images, world.device)
        except RuntimeError as error:  # out of memory, say
            failure = error
    if not world.all(failure is None):
        world.raise_together(failure)
    found = world.broadcast(found)
    return found


def _classify(
    parts: list[FeatureRows], images: ProbeImages, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    (train_ND, labels_N), (test_MD, truth_M) = (
        (
            torch.from_numpy(part.rows["feature"]).to(device),
            torch.from_numpy(part.rows["label"]).to(device),
        )
        for part in parts
    )
    scores = {}
    for name in images.classifiers:
        votes_MK = CLASSIFIERS[name](train_ND, labels_N, test_MD, images.num_classes)
        scores[SCORES[name]] = hit_rates(votes_MK, truth_M)["top1"]
    return scores, embedding_spread(test_MD)
