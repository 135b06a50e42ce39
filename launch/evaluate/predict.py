"""`zeta predict`: the most probable classes of images that have no label."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.loading.loader import PackLoader
from data_pipeline.shards.manifest import Manifest
from launch.evaluate.features import evaluation_data
from launch.evaluate.images import OpenedImages
from launch.evaluate.requests import trained_targets
from launch.evaluate.scores import Predict
from launch.evaluate.small_images import small_images
from launch.evaluate.zero_shot import TEMPLATES, ZeroShotClassifier
from launch.run.evaluation_plan import TRAIN, View, held_out_plan, view_at, view_within
from zeta.distributed import World
from zeta.models.config import load_pretrained
from zeta.models.exported import class_names
from zeta.models.sources import read_image_config
from zeta.probes.top_classes import TopClasses
from zeta.train.evaluation import Evaluation, evaluate


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, or why there are none."""

    image: str
    """File of the image, or its key in the shards."""
    classes: tuple[tuple[str, float], ...] = ()
    """(name, probability), most probable first."""
    error: str | None = None
    """Why the image could not be used."""


@dataclass(frozen=True)
class Question:
    """A prediction as the user asks for it."""

    export: Path
    resolution: str = TRAIN
    """`train`, `native`, or a side in pixels."""
    tokens: int | None = None
    """Largest number of patches of an image, in place of `resolution`."""
    top: int = 5
    """Number of classes to name of each image."""
    classes: Sequence[str] | None = None
    """Names to choose from, for a model of images and captions; every other model has its own."""
    templates: Sequence[str] = TEMPLATES
    """Prompts for these names."""
    workers: int = 2
    """Decoding processes of each rank."""


def check_question(question: Question) -> tuple[dict[str, Any], View, list[str]]:
    """Check a question before an image is read.

    Returns:
        config.json of the export, the size of the images, and the names of the classes.

    Raises:
        ValueError: not an export, one that knows no classes, or a size that it cannot process.
    """
    export, given = question.export, question.classes
    config = read_image_config(export)
    arguments, trained = config["model"], config["info"].get("resolution") or {}
    targets = trained_targets(config)
    if targets == "caption" and not given:
        raise ValueError(
            f"{export} is an image-text model, which tells images apart by the names of classes: "
            "give them, as in --classes cat,dog"
        )
    if targets != "caption" and given:
        raise ValueError(f"{export} was trained on classes of its own: leave --classes out")
    if targets == "none":
        raise ValueError(
            f"{export} was not trained on classes: `zeta embed {export} IMAGES OUT` writes features"
        )
    if question.tokens is None:
        view = view_at(question.resolution, arguments, trained)
    else:
        view = view_within(question.tokens, arguments, trained)
    names = given or class_names(config) or list(map(str, range(arguments["num_classes"])))
    return config, view, list(names)


def predict_images(question: Question, images: OpenedImages, world: World) -> list[Prediction]:
    """Return the most probable classes of every image, in order; every rank calls this.

    Images that cannot be used are in the list as well, with the reason.

    Raises:
        ValueError: as `check_question`; or the shards cannot be read.
        RunError: no image could be used.
    """
    config, view, names = check_question(question)
    manifest = Manifest.open(list(images.shards))
    model = load_pretrained(question.export).to(world.device).eval()
    arguments = config["model"]
    warning = small_images(manifest, arguments["patch_size"])
    if warning is not None and world.is_main:
        print(warning, file=sys.stderr)
    predict: Predict = model
    targets = trained_targets(config)
    if targets == "caption":
        predict = ZeroShotClassifier(question.export, names, question.templates).on(
            model, world.device
        )
    data = evaluation_data(manifest, arguments, question.workers, labels=False)
    plan = held_out_plan(manifest, data, view, num_lanes=world.size, name="the images")
    loader = PackLoader(plan, rank=world.rank, world_size=world.size)
    kept = TopClasses(question.top, world, independent=targets == "labels")
    with tqdm(total=len(manifest.samples), unit=" images", disable=not world.is_main) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        found = evaluate(predict, kept, loader, world, show=show)
    assert isinstance(found, Evaluation), "nothing asks it to stop"
    rejected = [item for rank in world.gather(found.rejected_here) for item in rank]
    return _in_order(kept, names, [*manifest.rejections(), *rejected], images.files)


def _in_order(
    kept: TopClasses, names: Sequence[str], rejected: Sequence[Any], files: Sequence[str] | None
) -> list[Prediction]:
    """Return a prediction for each image, good or bad, in order of sample id."""

    def name(sample_id: int, key: str) -> str:
        return key if files is None else files[sample_id]

    rows = kept.rows
    by_id: dict[int, Prediction] = {}
    for sample_id, key, classes, shares in zip(
        *(rows[column].tolist() for column in ("sample_id", "key", "classes", "probabilities")),
        strict=True,
    ):
        said = tuple((names[number], share) for number, share in zip(classes, shares, strict=True))
        by_id[sample_id] = Prediction(name(sample_id, key), said)
    for item in rejected:
        by_id[item.sample_id] = Prediction(name(item.sample_id, item.key), error=item.reason)
    return [by_id[sample_id] for sample_id in sorted(by_id)]
