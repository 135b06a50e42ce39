"""`zeta experiment`: compare NaViT with ViTs of one image size, at equal compute, on given images.

The arms are the recipes in configs/experiments: one model and optimizer, shown the same images in
different ways. NaViT's arm trains for `train.max_steps`; each other arm stops at the step where it
has used as many floating-point operations. They are counted from the plan, before anything is
trained (`zeta.models.flops`), so the compute is equal by construction, whatever the machine.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch

from data_pipeline.plan.plan import Plan
from data_pipeline.shards.build import build_split
from launch.config.load import ZetaConfig, load_config
from launch.evaluate.scores import evaluate_export
from launch.export import export_run
from launch.recipes.demo import build_digits
from launch.recipes.experiment_figures import Arm, TrainedArm, draw_experiment, results_table
from launch.recipes.working_folder import WorkingFolder, claim_folder, refuse_own_settings
from launch.report.derived_files import write_derived_files
from launch.report.headlines import last_value, seconds_in_steps
from launch.report.logged_run import read_run
from launch.report.page import write_report
from launch.run.checks import check_start
from launch.run.evaluation_plan import NATIVE
from launch.run.local import launch_local
from launch.shipped import configs_root
from zeta import metric_names as names
from zeta.exit_codes import ExitCode
from zeta.models.config import build_model
from zeta.models.flops import flop_rates
from zeta.models.packed_vit import PackedViT
from zeta.run.directory import RunDir

ARMS = ("navit", "fixed_48", "fixed_96")
"""Recipes in configs/experiments; the first one decides the compute."""
_TESTED = (24, 32, 48, 64, 80, 96, 128)
RESOLUTIONS = (NATIVE, *map(str, _TESTED))
"""Sides at which every arm is tested."""
_SIZES = (48, 96)
"""Sides of the arms of one size in their recipes."""
_LARGE = 160
"""Side from which on patches have 16 pixels instead of 8."""
_IMAGES_PER_PACK = 4
"""Fewest images of the largest size that a pack holds."""
VAL_SHARE = 0.2
"""Share of a folder of images that is held out."""
_POINTS = 8
"""Number of evaluations during training."""
_OWN_KEYS = {
    "run": "choose the folder with --out",
    "data.shards": "give the folder of images as SRC",
    "data.val_shards": "give the folder of images as SRC",
    "data.resolution": "that is what the arms differ in; choose other sides with --sizes",
    "data.drop": "that is what the arms differ in; see configs/experiments",
    "data.seed": "choose how many with --seeds",
    "train.seed": "choose how many with --seeds",
    "train.max_images": "set train.max_steps, of the NaViT arm; the others get as much compute",
    "train.max_tokens": "set train.max_steps, of the NaViT arm; the others get as much compute",
    "train.max_epochs": "set train.max_steps, of the NaViT arm; the others get as much compute",
    "train.evaluate": f"each run is evaluated {_POINTS} times",
    "optim.warmup_share": "it is a tenth of the steps of each arm",
    "optim.warmup_steps": "it is a tenth of the steps of each arm",
}


@dataclass(frozen=True)
class Design:
    """The arms of an experiment, and the sides at which they are tested."""

    arms: Mapping[str, tuple[str, tuple[str, ...]]]
    """Recipe in configs/experiments, and settings on top of it, by the name of the arm. The first
    arm decides the compute."""
    resolutions: Sequence[str]
    typed: Sequence[str] = ()
    """Options of the command line that give this design."""


def design_for(sizes: tuple[int, int] | None) -> Design:
    """Return the design with two sides in the place of 48 and 96 pixels; None: with these.

    Raises:
        ValueError: the sides are not a smaller and a larger one.
    """
    if sizes is None:
        return Design({name: (name, ()) for name in ARMS}, RESOLUTIONS)
    small, large = sizes
    patch = 16 if large >= _LARGE else 8
    if not 2 * patch <= small < large:
        raise ValueError(
            f"--sizes is {small},{large}; give a smaller and a larger side of at least {2 * patch} "
            "pixels (two patches), as in --sizes 96,224"
        )
    budget = max(1024, _IMAGES_PER_PACK * round(large / patch) ** 2)
    shared = (
        f"model.image_size={large}",
        f"model.patch_size={patch}",
        f"data.token_budget={budget}",
    )
    least = max(2 * patch, round(large / 3))
    ours = (f"data.resolution.min={least}", f"data.resolution.max={large}")
    arms: dict[str, tuple[str, tuple[str, ...]]] = {"navit": ("navit", (*shared, *ours))}
    for recipe, side in zip(ARMS[1:], sizes, strict=True):
        arms[f"fixed_{side}"] = (recipe, (*shared, f"data.resolution.max={side}"))
    sides = sorted({max(1, round(side * large / _SIZES[1] / patch)) * patch for side in _TESTED})
    return Design(arms, (NATIVE, *map(str, sides)), ("--sizes", f"{small},{large}"))


class ExperimentFolder(WorkingFolder):
    """The files of an experiment."""

    COMMAND = "experiment"

    def run(self, arm: str, seed: int) -> RunDir:
        """Run directory of an arm."""
        return RunDir(self.path / "runs" / f"{arm}_seed{seed}")

    def export(self, arm: str, seed: int) -> Path:
        """Exported model of an arm."""
        return self.path / "exports" / f"{arm}_seed{seed}"

    @property
    def result(self) -> Path:
        """All figures, as JSON."""
        return self.path / "result.json"

    @property
    def picture(self) -> Path:
        """Both charts, as PNG."""
        return self.path / "result.png"

    @property
    def report(self) -> Path:
        """The runs of the first seed, compared."""
        return self.path / "report.html"


def run_experiment(
    source: str | None,
    out: Path,
    *,
    seeds: int,
    nproc: int,
    overrides: Sequence[str],
    sizes: tuple[int, int] | None = None,
) -> int:
    """Run the experiment in the folder `out`, or the rest of it; return the exit status.

    Args:
        source: folder of images, its subfolders the classes (or any other source that `zeta shards
            build` takes); None: the digits of `zeta demo`.
        out: folder of the experiment; made if missing.
        seeds: runs of each arm, with different weights, order, sizes and dropped patches.
        nproc: ranks of a run; they change the speed and nothing else.
        overrides: `key=value` settings of all arms.
        sizes: sides of the two arms of one size, in pixels; NaViT's go from a third of the larger
            one to it. None: 48 and 96, for small images.

    Raises:
        ValueError: `out` holds something else, an override is wrong or changes a setting that the
            arms differ in, or the images cannot be used.
    """
    refuse_own_settings("zeta experiment", overrides, _OWN_KEYS)
    design, folder = design_for(sizes), ExperimentFolder(out)
    for name in design.arms:  # refuses a wrong override before anything is written
        _load(folder, design, name, 0, overrides)
    typed = [*design.typed, *overrides]
    wanted = {"source": source, "overrides": typed}
    claim_folder(folder, wanted, _as_typed, {})
    _build_shards(source, folder)
    trained = []
    for seed in range(seeds):
        compute: float | None = None
        for name in design.arms:
            arm, code = _train(folder, design, name, seed, nproc, overrides, compute)
            if code != ExitCode.FINISHED:
                if code == ExitCode.INTERRUPTED:
                    print("\nstopped; the same command continues")
                return code
            compute = arm.flops if compute is None else compute
            trained.append(_evaluated(folder, design, arm, seed))
    _write_results(folder, design, trained, _command(source, seeds, typed))
    return ExitCode.FINISHED


def _build_shards(source: str | None, folder: ExperimentFolder) -> None:
    shards = folder.path / "shards"
    if source is None:
        parts = build_digits(shards, seed=0)
    else:
        parts = build_split(source, shards, VAL_SHARE, progress=True)
    counts = ", ".join(f"{len(part.samples):,} {name}" for name, part in parts.items())
    print(f"images: {counts}")


def _train(
    folder: ExperimentFolder,
    design: Design,
    name: str,
    seed: int,
    nproc: int,
    overrides: Sequence[str],
    compute: float | None,
) -> tuple[Arm, int]:
    """Train an arm, and return it and the exit status of its run.

    Args:
        compute: floating-point operations to train with; None: those of `train.max_steps`.
    """
    config = _load(folder, design, name, seed, overrides)
    checked = check_start(config, nproc)
    flops = planned_flops(checked.plan, checked.config)
    if compute is None:
        assert config.train.max_steps is not None
        totals = list(islice(accumulate(flops), config.train.max_steps))
    else:
        totals = up_to(flops, compute)
    steps = len(totals)
    print(f"\n{name}, seed {seed}: {steps:,} steps, {totals[-1] / 1e12:.3g} TFLOP", flush=True)
    settings = [
        *_settings(folder, design, name, seed, overrides),
        f"train.max_steps={steps}",
        f"optim.warmup_steps={steps // 10}",
        f"train.evaluate.every={max(1, steps // _POINTS)}",
    ]
    code = launch_local(str(_recipe(design, name)), settings, nproc)
    return Arm(name, seed, checked.config, tuple(totals)), code


def planned_flops(plan: Plan, config: ZetaConfig) -> Iterator[float]:
    """Yield the operations of training on each step of a plan, forward and backward.

    Args:
        plan: the plan of the run.
        config: the config of the run, with the values that come from the shards filled in.
    """
    with torch.device("meta"):
        model = build_model(config.model)
    assert isinstance(model, PackedViT)
    rates = flop_rates(model)
    lanes = [plan.lane(lane) for lane in range(plan.num_lanes)]
    while True:
        packs = [lane.next_pack() for lane in lanes]
        if all(pack is None for pack in packs):
            return
        yield sum(rates.of(pack.lengths.tolist()) for pack in packs if pack is not None)


def up_to(flops: Iterator[float], compute: float) -> list[float]:
    """Return the running total up to the step at which it is closest to `compute`."""
    totals: list[float] = []
    for total in accumulate(flops):
        if totals and total - compute > compute - totals[-1]:
            break
        totals.append(total)
        if total >= compute:
            break
    return totals


def _evaluated(folder: ExperimentFolder, design: Design, arm: Arm, seed: int) -> TrainedArm:
    """Export an arm's model and score it at all resolutions, unless that was done before."""
    run_dir, export = folder.run(arm.name, seed), folder.export(arm.name, seed)
    if not run_dir.evaluation.exists():
        export_run(run_dir.path, export, overwrite=True)
        scores = evaluate_export(export, str(folder.shards("val")), design.resolutions, workers=0)
        run_dir.evaluation.write_text(json.dumps(scores))
    run = read_run(run_dir.path)
    images, tokens = (last_value(run, name) for name in (names.IMAGES_SEEN, names.TOKENS_SEEN))
    top1 = run.series[names.val_score("top1")]
    return TrainedArm(
        arm=arm,
        images_seen=int(images or 0),
        tokens_seen=int(tokens or 0),
        train_seconds=seconds_in_steps(run) or 0.0,
        top1_by_flops=[
            (arm.totals[int(step) - 1], float(value))
            for step, value in zip(top1.steps, top1.values, strict=True)
        ],
        top1_by_resolution=dict(run.accuracy_by("by_resolution")),
        val_images=run.evaluation["by_resolution"][NATIVE]["images"],
    )


def _write_results(
    folder: ExperimentFolder, design: Design, trained: Sequence[TrainedArm], command: str
) -> None:
    rows = [row.to_json() for row in trained]
    folder.result.write_text(json.dumps({"command": command, "runs": rows}, indent=1) + "\n")
    folder.picture.write_bytes(draw_experiment(trained))
    first, *others = (folder.run(name, 0) for name in design.arms)
    for run_dir in (first, *others):
        write_derived_files(run_dir)
    write_report(first.path, folder.report, [other.path for other in others], axis="tokens")
    print("\n" + "\n".join(results_table(trained)))
    print(f"\n{folder.result}\n{folder.picture}\n{folder.report}")


def _load(
    folder: ExperimentFolder, design: Design, name: str, seed: int, overrides: Sequence[str]
) -> ZetaConfig:
    settings = _settings(folder, design, name, seed, overrides)
    return load_config(str(_recipe(design, name)), settings)


def _settings(
    folder: ExperimentFolder, design: Design, name: str, seed: int, overrides: Sequence[str]
) -> list[str]:
    return [
        f"run.dir={folder.run(name, seed).path}",
        f"run.name={name}",
        f"data.shards={folder.shards('train')}",
        f"data.val_shards={folder.shards('val')}",
        f"data.seed={seed}",
        f"train.seed={seed}",
        *design.arms[name][1],
        *overrides,
    ]


def _recipe(design: Design, name: str) -> Path:
    return configs_root() / "experiments" / f"{design.arms[name][0]}.yaml"


def _as_typed(settings: Mapping[str, Any]) -> str:
    return _command(settings["source"], None, settings["overrides"])


def _command(source: str | None, seeds: int | None, overrides: Sequence[str]) -> str:
    words = ["zeta", "experiment", *([] if source is None else [source])]
    return shlex.join([*words, *([] if seeds is None else ["--seeds", str(seeds)]), *overrides])
