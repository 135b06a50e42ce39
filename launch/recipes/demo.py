"""`zeta demo`: the whole pipeline on a laptop, from images to a report.

Scanned digits of many sizes are written as shards, planned, trained on two ranks of ZeRO-2 by the
local launcher, exported, evaluated on held-out scans, and reported. Each stage is the one that
`zeta shards`, `data plan`, `launch local`, `export`, `eval` and `report` run; only the images are
the demo's own. A demo that was interrupted continues where it stopped.
"""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.plan.summary import summarise
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.weighted import open_shards
from launch.config.load import load_config
from launch.config.resolve import resolve_with_shards, training_plan
from launch.evaluate.scores import evaluate_export
from launch.export import export_run
from launch.recipes.digits import CLASS_NAMES, render_split
from launch.recipes.working_folder import (
    WorkingFolder,
    claim_folder,
    refuse_own_settings,
    write_notes,
)
from launch.report.derived_files import write_derived_files
from launch.report.page import write_report
from launch.run.evaluation_plan import NATIVE, TRAIN
from launch.run.local import launch_local
from launch.tables import accuracy_table, plan_table
from zeta import metric_names as names
from zeta.exit_codes import ExitCode
from zeta.run.directory import RunDir

RANKS = 2
RENDERINGS = 4
"""JPEGs made of each training scan, of different sizes and shapes."""
RESOLUTIONS = (TRAIN, NATIVE, "24", "48", "64", "80", "96", "128")
"""Training draws sides of 24 to 96 px; it never sees 128."""
_SAMPLES_PER_SHARD = 512
_OWN_KEYS = {
    "run.dir": "choose the folder with --out",
    "data.shards": "it trains on its digits; for other shards use zeta launch local",
    "data.val_shards": "it evaluates on digits that it holds out",
    "data.seed": "choose the seed with --seed",
    "train.seed": "choose the seed with --seed",
}
"""Settings that the demo makes itself, and what to do instead."""


class DemoFolder(WorkingFolder):
    """The run directory of the demo, with its shards and its export inside."""

    COMMAND = "demo"

    @property
    def export(self) -> Path:
        """The exported model."""
        return self.path / "export"


def run_demo(out: Path, seed: int = 0, overrides: Sequence[str] = ()) -> int:
    """Run the demo in the folder `out`, or the rest of it, and return the exit status.

    Args:
        out: folder of the demo; made if missing.
        seed: decides which scans are held out, every rendering, the order, and the weights.
        overrides: `key=value` settings of the `demo` recipe.

    Raises:
        ValueError: `out` holds something else, or a demo with other settings; or an override is
            wrong, or changes a setting that the demo makes itself.
    """
    refuse_own_settings("zeta demo", overrides, _OWN_KEYS)
    folder = DemoFolder(out)
    recipe = [
        f"run.dir={out}",
        f"data.shards={folder.shards('train')}",
        f"data.val_shards={folder.shards('val')}",
        f"data.seed={seed}",
        f"train.seed={seed}",
        *overrides,
    ]
    load_config("demo", recipe)  # refuses a wrong override before anything is written
    wanted = {"seed": seed, "overrides": list(overrides)}
    counts = claim_folder(folder, wanted, _as_typed, {"train_seconds": 0.0})
    print("zeta demo: variable-resolution images -> shards -> packs -> ZeRO-2 -> export -> eval\n")

    _headline(1, "shards: scanned digits, each a JPEG of its own size and shape")
    for split, manifest in build_digits(folder.path / "shards", seed).items():
        print(f"  {len(manifest.samples):,} {split} images in {folder.shards(split)}")

    _headline(2, "plan: what an epoch will look like, from image sizes alone")
    _print_plan(recipe)

    _headline(3, f"train: {RANKS} ranks, DeepSpeed ZeRO-2 on CPU (logs in {RunDir(out).logs})")
    if RunDir(out).finished.exists():
        print("  finished before")
    else:
        started = time.perf_counter()
        code = launch_local("demo", recipe, RANKS)
        counts["train_seconds"] += time.perf_counter() - started
        write_notes(folder, wanted, counts)
        if code != ExitCode.FINISHED:
            if code == ExitCode.INTERRUPTED:
                print(f"\nstopped; `zeta demo {_again(out, seed, overrides)}` continues")
            return code

    evaluation = _export_and_evaluate(folder)
    _report(folder, evaluation, counts["train_seconds"])
    return ExitCode.FINISHED


def _export_and_evaluate(folder: DemoFolder) -> dict[str, Any]:
    """Run stages 4 and 5; return the scores."""
    _headline(4, "export: newest checkpoint as safetensors")
    export_run(folder.path, folder.export, overwrite=True)
    print(f"  {folder.export}")

    _headline(5, "evaluate: scans never seen in training; 128 px was never trained at")
    evaluation = evaluate_export(folder.export, str(folder.shards("val")), RESOLUTIONS, workers=0)
    RunDir(folder.path).evaluation.write_text(json.dumps(evaluation))
    print("\n".join(f"  {line}" for line in accuracy_table(evaluation)))
    return evaluation


def _report(folder: DemoFolder, evaluation: dict[str, Any], train_seconds: float) -> None:
    """Run stage 6, and print the result and what to type next."""
    _headline(6, "report")
    run_dir = RunDir(folder.path)
    result = _result(run_dir, evaluation, train_seconds)
    run_dir.result.write_text(json.dumps(result) + "\n")
    write_derived_files(run_dir)
    print(f"  {write_report(folder.path)}")
    _print_ending(result, folder)


def build_digits(out: Path, seed: int) -> dict[str, Manifest]:
    """Write the demo's images as shards, `out`/train and `out`/val, and return their manifests."""
    return {
        split: build_shards(
            render_split(split, seed=seed, renderings=renderings),
            out / split,
            max_count=_SAMPLES_PER_SHARD,
            class_names=CLASS_NAMES,
        )
        for split, renderings in (("train", RENDERINGS), ("val", 1))
    }


def _as_typed(settings: Mapping[str, Any]) -> str:
    return " ".join([f"--seed {settings['seed']}", *settings["overrides"]])


def _again(out: Path, seed: int, overrides: Sequence[str]) -> str:
    return shlex.join(["--out", str(out), "--seed", str(seed), *overrides])


def _headline(number: int, text: str) -> None:
    print(f"\n[{number}/6] {text}", flush=True)


def _print_plan(recipe: Sequence[str]) -> None:
    config = load_config("demo", recipe)
    manifest = open_shards(config.data.shards)
    plan = training_plan(resolve_with_shards(config, manifest), manifest)
    summary = summarise(plan, RANKS)
    print("\n".join(f"  {line}" for line in plan_table(summary, plan.num_lanes, RANKS)))


def _result(run_dir: RunDir, evaluation: dict[str, Any], train_seconds: float) -> dict[str, float]:
    """Return the content of result.json; throughput and fill are medians over the run's lines."""
    lines = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]

    def median(name: str) -> float:
        return float(statistics.median(line[name] for line in lines if name in line))

    return {
        "val_top1": evaluation["top1"],
        "train_seconds": train_seconds,
        "fill": median(names.FILL),
        "images_per_s": median(names.IMAGES_PER_S),
    }


def _print_ending(result: dict[str, float], folder: DemoFolder) -> None:
    run_dir = shlex.quote(str(folder.path))
    first = "" if shutil.which("zeta") else ", after `. .venv/bin/activate`"
    minutes, seconds = divmod(round(result["train_seconds"]), 60)
    print(
        f"\ntop-1 {result['val_top1']:.2%} on held-out scans, as in training, "
        f"{minutes}:{seconds:02d} of training on {RANKS} CPU ranks\n"
        f"\nwhat to type next{first}:\n"
        "  your own images   zeta shards build path/to/images shards/mine\n"
        "                    zeta launch local first_run --nproc 2 data.shards=shards/mine\n"
        "  a Slurm cluster   zeta launch slurm navit_b16_classification --nodes 2 "
        "--gpus-per-node 8 data.shards=shards/mine\n"
        f"  into timm         zeta export {run_dir} exports/demo --format timm"
    )
