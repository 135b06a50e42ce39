"""What does an encoder learn without labels? Photos of 32 pixels, equal compute, equal seeds.

    python -m tests.benchmarks.learning.without_labels OUT --photos FOLDER

FOLDER has the folders `train` and `test`, and in each a folder a class. For each of `--seeds 0,1,2`
the encoder of the recipe first_views is trained three times on the training photos, with as many
operations: by lejepa, with labels (supervised), and by distill from the supervised one, whose
forward passes are counted too. Beside them stand the encoder as it was before any training, and the
pixels themselves. Every encoder is exported and frozen, and `zeta eval --knn --probe` classifies
the test photos by 500 labelled photos a class. What finished is kept, so the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipeline.shards.build import build_shards
from launch.config.load import load_config
from launch.evaluate.requests import Request, prepare
from launch.evaluate.scores import run_evaluation
from launch.export import export_run
from launch.recipes.experiment import planned_flops, up_to
from launch.run.checks import CheckedRun, check_start
from tests.benchmarks.learning.runs import run_zeta, spread, write_photo_shards
from zeta.distributed import RankInfo, World
from zeta.export.saving import save_pretrained
from zeta.models.config import build_model
from zeta.models.flops import flop_rates
from zeta.models.packed_vit import PackedViT
from zeta.probes.classifiers import CLASSIFIERS

RECIPE = "first_views"
SMALL = (
    "model.image_size=32",
    "model.patch_size=4",
    "data.resolution.min=28",
    "data.resolution.max=32",
    "data.local.resolution.min=12",
    "data.local.resolution.max=20",
)
"""Settings for photos of 32 pixels: as many patches as the recipe has of larger ones."""
ONE_VIEW = (
    "data.views=1",
    "data.drop.rate=0.5",
    "data.local.views=0",
    *(f"data.augment.colour.{change}=0" for change in ("jitter", "grey", "solarise")),
)
ARMS = {
    "lejepa": (),
    "supervised": ("objective.kind=softmax", *ONE_VIEW),
    "distill": ("objective.kind=distill", "data.drop.keep=true", *ONE_VIEW),
}
"""The settings of what is trained."""
FIRST = "lejepa"
"""The arm that decides the compute."""
LABELLED = 500
"""Photos of each class that k-NN and probe learn from."""
SCORES = ("knn", "linear_probe")

Scores = dict[str, float]


class Folder:
    """The files of a comparison."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.train, self.val, self.labelled = path / "train", path / "val", path / "labelled"

    def scores(self, arm: str, seed: int) -> Path:
        return self.path / f"{arm}-{seed}.json"

    def run(self, arm: str, seed: int) -> Path:
        return self.path / "runs" / f"{arm}-{seed}"

    def export(self, arm: str, seed: int) -> Path:
        return self.path / "exports" / f"{arm}-{seed}"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2", help="seeds, or some of them (default: 0,1,2)")
    parser.add_argument("--steps", type=int, default=1000, help="of lejepa (default: 1000)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="to train now")
    options = parser.parse_args(words)
    folder, seeds = Folder(options.out), [int(word) for word in options.seeds.split(",")]
    write_photo_shards(options.photos, folder.path)
    build_shards(str(some_of_each(options.photos / "train", folder.path)), folder.labelled)
    found: dict[str, list[Scores]] = {"pixels": [pixel_scores(options.photos, folder)]}
    for seed in seeds:  # an interrupted comparison has whole seeds
        before = {"initialisation": initial_scores(folder, seed)}
        for arm, scores in (before | trained(folder, seed, options)).items():
            print(arm, f"seed {seed}", json.dumps(scores), flush=True)
            found.setdefault(arm, []).append(scores)
    print("\n".join(table(found)))


def some_of_each(classes: Path, out: Path) -> Path:
    """Return a folder of links to `LABELLED` photos of each class, drawn once."""
    chosen = out / "photos_with_labels"
    for of_class in sorted(path for path in classes.iterdir() if path.is_dir()):
        (chosen / of_class.name).mkdir(parents=True, exist_ok=True)
        photos = sorted(of_class.iterdir())
        for photo in random.Random(0).sample(photos, min(LABELLED, len(photos))):
            link = chosen / of_class.name / photo.name
            if not link.exists():
                link.symlink_to(photo.resolve())
    return chosen


def pixel_scores(photos: Path, folder: Folder) -> Scores:
    """Return the scores of the pixels themselves, in place of features."""
    kept = folder.path / "pixels.json"
    if kept.exists():
        return _read(kept)
    train_ND, labels_N = _pixels(folder.path / "photos_with_labels")
    test_MD, truth_M = _pixels(photos / "test")
    classes = int(truth_M.max()) + 1
    found = {name: CLASSIFIERS[name](train_ND, labels_N, test_MD, classes) for name in SCORES}
    hits = {name: float((of.argmax(1) == truth_M).double().mean()) for name, of in found.items()}
    kept.write_text(json.dumps(hits))
    return hits


def _pixels(classes: Path) -> tuple[torch.Tensor, torch.Tensor]:
    names = sorted(path.name for path in classes.iterdir() if path.is_dir())
    paths = [(path, i) for i, name in enumerate(names) for path in (classes / name).iterdir()]
    pixels = [np.asarray(Image.open(path).convert("RGB")).ravel() for path, _ in paths]
    rows = torch.from_numpy(np.stack(pixels)).double() / 255
    return rows, torch.tensor([label for _, label in paths])


def initial_scores(folder: Folder, seed: int) -> Scores:
    """Return the scores of the encoder before any training."""
    if not folder.scores("initialisation", seed).exists():
        settings = [*SMALL, "model.num_classes=1", f"data.shards={folder.train}"]
        config = load_config(RECIPE, settings).model
        weights = build_model(config, seed).state_dict()
        save_pretrained(folder.export("initialisation", seed), weights, config.resolve())
    return _scored(folder, "initialisation", seed, {})


def trained(folder: Folder, seed: int, options: argparse.Namespace) -> dict[str, Scores]:
    """Return the scores of the trained encoders; train what was not trained before."""
    found: dict[str, Scores] = {}
    compute = 0.0
    for arm in ARMS:
        if arm not in (FIRST, *options.arms):
            continue
        settings = _settings(folder, arm, seed)
        flops = _with_teacher(arm, check_start(load_config(RECIPE, settings), 1))
        if arm == FIRST:
            totals = list(islice(accumulate(flops), options.steps))
            compute = totals[-1]
        else:
            totals = up_to(flops, compute)
        if arm not in options.arms:
            continue
        used = {"steps": len(totals), "tflop": totals[-1] / 1e12}
        if not folder.scores(arm, seed).exists():
            words = ["train", RECIPE, *settings, f"train.max_steps={len(totals)}"]
            used["cpu_min"] = run_zeta(words, f"{arm}, seed {seed},") / 60
            export_run(folder.run(arm, seed), folder.export(arm, seed), overwrite=True)
        found[arm] = _scored(folder, arm, seed, used)
    return found


def _with_teacher(arm: str, planned: CheckedRun) -> Iterator[float]:
    """Yield the operations of each step, with those of the teacher, an encoder of the same size.

    It sees all patches, and its forward pass is a third of training on them. Its share is that of
    the first pack.
    """
    flops = planned_flops(planned.plan, planned.config)
    if arm != "distill":
        return flops
    with torch.device("meta"):
        model = build_model(planned.config.model)
    assert isinstance(model, PackedViT)
    rates = flop_rates(model)
    pack = planned.plan.lane(0).next_pack()
    assert pack is not None
    whole = (pack.rows * pack.columns).tolist()
    share = rates.of(whole) / 3 / rates.of(pack.lengths.tolist())
    return (of_step * (1 + share) for of_step in flops)


def _settings(folder: Folder, arm: str, seed: int) -> list[str]:
    settings = [*SMALL, *ARMS[arm], f"run.dir={folder.run(arm, seed)}"]
    settings += [f"data.shards={folder.train}", f"data.seed={seed}", f"train.seed={seed}"]
    settings += ["train.evaluate.knn=false", "train.evaluate.probe=false"]
    settings += ["train.checkpoint_every=null", "train.log_every=50", "train.dtype=bf16"]
    settings += ["data.workers=0", "tracker.wandb.mode=disabled"]
    if arm == "distill":
        settings.append(f"objective.distill.teacher={folder.export('supervised', seed)}")
    return settings


def _scored(folder: Folder, arm: str, seed: int, used: dict[str, float]) -> Scores:
    """Return the scores of an export, and what its training used; kept as JSON."""
    kept = folder.scores(arm, seed)
    if not kept.exists():
        labelled = [str(folder.labelled)]
        request = Request(
            folder.export(arm, seed),
            str(folder.val),
            ("native",),
            knn=labelled,
            probe=labelled,
            workers=0,
        )
        result = run_evaluation(prepare(request), World(RankInfo(), torch.device("cpu")))
        kept.write_text(json.dumps({name: result[name]["top1"] for name in SCORES} | used))
    return _read(kept)


def _read(path: Path) -> Scores:
    scores: Scores = json.loads(path.read_text())
    return scores


def table(found: dict[str, list[Scores]]) -> list[str]:
    """Return mean and deviation over the seeds, in per cent, as Markdown."""
    lines = ["| encoder | linear probe | k-NN | TFLOP | CPU minutes |", "| --- " * 5 + "|"]
    for arm, runs in found.items():
        cells = [_percent(runs, "linear_probe"), _percent(runs, "knn")]
        for name, form in (("tflop", ".1f"), ("cpu_min", ".1f")):
            values = [run[name] for run in runs if name in run]
            cells.append(f"{sum(values) / len(values):{form}}" if values else "")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def _percent(runs: Sequence[dict[str, Any]], name: str) -> str:
    return spread([100 * run[name] for run in runs], ".1f")


if __name__ == "__main__":
    main()
