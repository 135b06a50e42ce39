"""Does bf16 hurt learning? Digits, and a folder of photos, in bf16 and in fp32 from equal seeds.

    python -m tests.benchmarks.bf16_learning OUT [--photos FOLDER] [--seeds 3] [--steps 250]

Every run is a `zeta train` on this CPU, for a fixed number of steps; bf16 is the path that a GPU
takes (copies of the weights and a residual stream in bf16, weights and sums in fp32). FOLDER has
the folders `train` and `test`, and in each a folder a class. Runs that finished are kept, so the
same command goes on. Prints the scores on held-out images as a table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
from pathlib import Path

import zeta.train.engine  # noqa: F401  # once, before the runs are forked
from data_pipeline.shards.build import build_shards
from launch.cli import entry_point
from launch.recipes.demo import build_digits
from zeta.run.directory import RunDir

DTYPES = ("fp32", "bf16")
SCORES = ("val/top1", "val/loss", "train/loss")
PHOTOS = ("model.image_size=32", "model.patch_size=4", "data.resolution.max=32")
"""Settings for photos of 32 pixels, on top of the demo's: 36 to 64 patches each."""


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args(words)
    sets = {"digits": ()} | ({"photos": PHOTOS} if options.photos else {})
    for name in sets:
        write_shards(name, options.out / name, options.photos)
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in range(options.seeds):  # an interrupted comparison has whole seeds
        for name, settings in sets.items():
            for dtype in DTYPES:
                scores = trained(options.out, name, dtype, seed, options.steps, settings)
                print(name, dtype, f"seed {seed}", scores, flush=True)
                results.setdefault((name, dtype), []).append(scores)
    print("\n".join(table(results)))


def write_shards(name: str, out: Path, photos: Path | None) -> None:
    if name == "digits":
        build_digits(out, seed=0)
        return
    assert photos is not None
    for split, source in (("train", "train"), ("val", "test")):
        build_shards(str(photos / source), out / split)


def trained(
    out: Path, name: str, dtype: str, seed: int, steps: int, settings: tuple[str, ...]
) -> dict[str, float]:
    """Scores at the last step of a run, which is trained unless it was before."""
    run = RunDir(out / f"{name}-{dtype}-{seed}")
    own = [f"run.dir={run.path}", f"data.shards={out / name}/train"]
    own += [f"data.val_shards={out / name}/val", f"data.seed={seed}", f"train.seed={seed}"]
    own += [f"train.max_steps={steps}", f"optim.warmup_steps={steps // 10}"]
    own += [f"train.evaluate.every={steps}", "train.checkpoint_every=null", "train.log_every=50"]
    own += ["data.workers=0"]
    own += [f"train.dtype={dtype}", "tracker.wandb.mode=disabled"]
    if not run.finished.exists():
        words = ["train", "demo", *own, *settings]
        process = multiprocessing.get_context("fork").Process(target=train, args=(words,))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{name} in {dtype} ended with {process.exitcode}")
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return {score: [line[score] for line in lines if score in line][-1] for score in SCORES}


def train(words: list[str]) -> None:
    """Run `zeta` in a process of its own, which has imported everything."""
    sys.exit(entry_point(words))


def table(results: dict[tuple[str, str], list[dict[str, float]]]) -> list[str]:
    """Mean and deviation over the seeds, and the mean of the differences that seeds have."""
    lines = ["| images | dtype | " + " | ".join(SCORES) + " |", "| --- " * (2 + len(SCORES)) + "|"]
    for (name, dtype), runs in results.items():
        cells = [spread([run[score] for run in runs]) for score in SCORES]
        lines.append(f"| {name} | {dtype} | " + " | ".join(cells) + " |")
    for name in dict.fromkeys(name for name, _ in results):
        pairs = list(zip(*(results[name, dtype] for dtype in DTYPES), strict=True))
        cells = [spread([b[score] - a[score] for a, b in pairs], "+") for score in SCORES]
        lines.append(f"| {name} | bf16 - fp32 | " + " | ".join(cells) + " |")
    return lines


def spread(values: list[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.4f} ± {deviation:.4f}"


if __name__ == "__main__":
    main()
