"""Does a setting hurt or help learning? Digits, and a folder of photos, from equal seeds.

    python -m tests.benchmarks.learning.settings OUT [--vary KIND] [--photos FOLDER]

`--vary dtype` compares bf16 with fp32: bf16 is the path that a GPU takes (copies of the weights and
a residual stream in bf16, weights and sums in fp32). `--vary optimizer` compares Muon with AdamW in
fp32, at equal steps and at four rates. `--vary augmentation` compares RandAugment, mixup and CutMix
with flips and crops alone. Every run is a `zeta train` on this CPU, for a fixed number
of steps (`--steps 250`, `--seeds 3`). FOLDER has the folders `train` and `test`, and in each a
folder a class; `--no-digits` leaves the digits out. Runs that finished are kept, so the same
command goes on. Prints the scores on held-out images as a table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from launch.recipes.demo import build_digits
from tests.benchmarks.learning.runs import run_zeta, spread, write_photo_shards
from zeta.run.directory import RunDir

_FLIPS = ("data.augment.flip=true", "data.augment.crop_min_area=0.5")
_RAND = ("data.augment.rand_augment.layers=2", "data.augment.rand_augment.magnitude=9")
RATES = ("1e-3", "2e-3", "4e-3", "8e-3")
ARMS: dict[str, dict[str, tuple[str, ...]]] = {
    "dtype": {dtype: (f"train.dtype={dtype}",) for dtype in ("fp32", "bf16")},
    "optimizer": {
        f"{kind} {rate}": ("train.dtype=fp32", f"optim.kind={kind}", f"optim.lr={rate}")
        for rate in RATES
        for kind in ("adamw", "muon")
    },
    "augmentation": {
        name: ("train.dtype=fp32", *_FLIPS, *settings)
        for name, settings in {
            "flip, crop": (),
            "RandAugment": _RAND,
            "mixup": ("data.mix.mixup_alpha=0.2",),
            "CutMix": ("data.mix.cutmix_alpha=1",),
            "all three": (*_RAND, "data.mix.mixup_alpha=0.2", "data.mix.cutmix_alpha=1"),
        }.items()
    },
}
"""The settings of what is compared, by name."""
SCORES = ("val/top1", "val/loss", "train/loss")
PHOTOS = ("model.image_size=32", "model.patch_size=4", "data.resolution.max=32")
"""Settings for photos of 32 pixels, on top of the demo's: 36 to 64 patches each."""

Results = dict[tuple[str, str], list[dict[str, float]]]
"""Scores of each seed, by images and arm."""


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--vary", choices=ARMS, default="dtype")
    parser.add_argument("--digits", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args(words)
    sets: dict[str, tuple[str, ...]] = {"digits": ()} if options.digits else {}
    sets |= {"photos": PHOTOS} if options.photos else {}
    if options.digits:
        build_digits(options.out / "digits", seed=0)
    if options.photos:
        write_photo_shards(options.photos, options.out / "photos")
    results: Results = {}
    for seed in range(options.seeds):  # an interrupted comparison has whole seeds
        for name, settings in sets.items():
            for arm, own in ARMS[options.vary].items():
                scores = trained(options.out, name, arm, seed, options.steps, (*settings, *own))
                print(name, arm, f"seed {seed}", scores, flush=True)
                results.setdefault((name, arm), []).append(scores)
    print("\n".join(table(results, options.vary)))


def trained(
    out: Path, name: str, arm: str, seed: int, steps: int, settings: tuple[str, ...]
) -> dict[str, float]:
    """Scores at the last step of a run, which is trained unless it was before."""
    run = RunDir(out / f"{name}-{arm.replace(',', '').replace(' ', '-')}-{seed}")
    own = [f"run.dir={run.path}", f"data.shards={out / name}/train"]
    own += [f"data.val_shards={out / name}/val", f"data.seed={seed}", f"train.seed={seed}"]
    own += [f"train.max_steps={steps}", f"optim.warmup_steps={steps // 10}"]
    own += [f"train.evaluate.every={steps}", "train.checkpoint_every=null", "train.log_every=50"]
    own += ["data.workers=0", "tracker.wandb.mode=disabled"]
    if not run.finished.exists():
        words = ["train", "demo", *own, *settings]
        run_zeta(words, f"{name} with {arm}")
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return {score: [line[score] for line in lines if score in line][-1] for score in SCORES}


def table(results: Results, vary: str) -> list[str]:
    """Mean and deviation over the seeds, and the mean of the differences that seeds have."""
    lines = [f"| images | {vary} | " + " | ".join(SCORES) + " |"]
    lines.append("| --- " * (2 + len(SCORES)) + "|")
    for (name, arm), runs in results.items():
        cells = [spread([run[score] for run in runs]) for score in SCORES]
        lines.append(f"| {name} | {arm} | " + " | ".join(cells) + " |")
    for name in dict.fromkeys(name for name, _ in results):
        for first, second in compared(vary):
            pairs = list(zip(results[name, first], results[name, second], strict=True))
            cells = [spread([b[score] - a[score] for a, b in pairs], "+.4f") for score in SCORES]
            lines.append(f"| {name} | {second} - {first} | " + " | ".join(cells) + " |")
    return lines


def compared(vary: str) -> list[tuple[str, str]]:
    """Pairs of arms: each second one and the one before; of augmentation each and the first."""
    first, *others = arms = list(ARMS[vary])
    if vary == "augmentation":
        return [(first, other) for other in others]
    return list(zip(arms[::2], arms[1::2], strict=True))


if __name__ == "__main__":
    main()
