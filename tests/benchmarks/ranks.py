"""Two ranks against two single-rank runs side by side, and how long a rank waits for data.

    python -m tests.benchmarks.ranks [--steps 12] [--rounds 10] [--tokens 4096]

`navit_s16` in bf16 on photograph-like JPEGs, one thread a rank, one worker each, through `zeta
launch local`: real runs from real shards, one pack a rank and step, of as many tokens as a pack of
the recipe has. They take turns; a run counts by the median of its steps, the first four left out,
in which memory is touched for the first time. The wait is that of the runs side by side. Bounds
are printed for comparison: a busy machine misses them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from data_pipeline.shards.build import build_shards
from tests.benchmarks.loader import write_photos

LEAST_SHARE, MOST_WAIT = 0.90, 0.01
_IMAGES, _WARM_UP = 2000, 4
"""Number of images, at most one epoch of all steps: the last pack of an epoch is not full."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    shares, waits = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_shards(write_photos(folder / "photos", _IMAGES), folder / "shards")
        for number in range(options.rounds):
            together = folder / f"together-{number}"
            finish([start(folder, together, 2, options)])
            alone = [folder / f"alone-{number}-{i}" for i in range(2)]
            finish([start(folder, path, 1, options) for path in alone])
            rates = [rate(path, "throughput/tokens_per_s") for path in alone]
            shares.append(rate(together, "throughput/tokens_per_s") / sum(rates))
            waits += [rate(run, "time/data_wait_s") / rate(run, "time/step_s") for run in alone]
            both = ", ".join(f"{wait:.2%}" for wait in waits[-2:])
            print(f"{shares[-1]:.3f} of two runs; data wait {both} of a step", flush=True)
    share, wait = statistics.median(shares), statistics.median(waits)
    print(f"two ranks / two runs side by side  {share:.3f} (quiet machine: at least {LEAST_SHARE})")
    print(f"data wait of a step                {wait:.2%} (quiet machine: at most {MOST_WAIT:.0%})")


def start(
    folder: Path, run_dir: Path, ranks: int, options: argparse.Namespace
) -> subprocess.Popen[str]:
    values = {
        "run.dir": run_dir,
        "data.shards": folder / "shards",
        "data.token_budget": options.tokens,
        "data.max_images_per_pack": 192,
        "data.workers": 1,
        "model.preset": "navit_s16",
        "train.packs_per_step": ranks,
        "train.max_steps": options.steps,
        "train.checkpoint_every": options.steps,
        "train.log_every": 1,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
        "optim.cooldown_steps": 0,
        "tracker.wandb.mode": "disabled",
    }
    command = [sys.executable, "-m", "launch", "launch", "local", "navit_b16_classification"]
    command += ["--nproc", str(ranks), *(f"{key}={value}" for key, value in values.items())]
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(runs: list[subprocess.Popen[str]]) -> None:
    for run in runs:
        output, _ = run.communicate()
        if run.returncode:
            raise SystemExit(output)


def rate(run_dir: Path, metric: str) -> float:
    """Median of a metric over the steps of a run, without the first steps."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([line[metric] for line in lines if metric in line][_WARM_UP:])


if __name__ == "__main__":
    main()
