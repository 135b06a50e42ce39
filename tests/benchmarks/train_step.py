"""Training step of zeta against timm, vit-pytorch and the bare matrix products, on the CPU.

    python -m tests.benchmarks.train_step [--dtype bf16|fp32] [--images 64] [--rounds 10]

Same images (realistic mix of sizes, side 64 to 256 pixels, patch 16), same width, depth, dtype,
optimizer and process; medians of interleaved rounds. `--compile` compiles zeta's blocks and timm's
whole model. Prints a table.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tests.benchmarks import contestants, workload
from tests.benchmarks.contestants import Contestant
from tests.benchmarks.products import Products, useful_flops
from tests.benchmarks.timing import interleave, ratio, train_step
from zeta.train.engine import compile_blocks

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FLOORS = {
    ("bf16", "timm"): 2.2,
    ("bf16", "vit-pytorch"): 1.7,
    ("bf16", "products"): 0.60,
    ("fp32", "timm"): 1.8,
}
"""Least ratio of the other's time to zeta's, or of zeta's rate to that of the products."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = workload.realistic(options.images)
    makers = entrants(work)
    if options.memory_of:
        print(peak_memory(makers[options.memory_of], work, DTYPES[options.dtype]))
        return
    compare(options, work, makers)


def entrants(work: workload.Workload) -> dict[str, Callable[[], Contestant]]:
    return {
        "zeta": partial(contestants.zeta_pack, work),
        "zeta/list": partial(contestants.zeta_list, work),
        **contestants.peers(work),
    }


def compare(
    options: argparse.Namespace,
    work: workload.Workload,
    makers: dict[str, Callable[[], Contestant]],
) -> None:
    dtype = DTYPES[options.dtype]
    built = {name: make() for name, make in makers.items()}
    if options.compile:
        for name, (model, _) in built.items():
            if name.startswith("zeta"):
                compile_blocks(model)
            elif name == "timm":
                model.compile()
    steps: dict[str, Callable[[], object]] = {
        name: train_step(one, work.labels, dtype) for name, one in built.items()
    }
    only_best_grouping(steps)
    steps["zeta, no update"] = train_step(built["zeta"], work.labels, dtype, update=False)
    steps["products"] = Products(work.lengths, dtype)
    seconds = interleave(steps, options.rounds)
    flops = useful_flops(work.lengths)
    print(
        f"{options.dtype}, {options.threads} threads, {len(work.images)} images, "
        f"{sum(work.lengths)} tokens, longest {max(work.lengths)}, {flops / 1e9:.0f} GFLOP a step"
        f"{', compiled' if options.compile else ''}; medians of {options.rounds}"
    )
    for name, times in seconds.items():
        median = statistics.median(times)
        line = f"{name:22} {median:7.3f} s  {len(work.images) / median:7.1f} images/s"
        line += (
            f"  {flops / median / 1e9:6.0f} GFLOP/s  {ratio(times, seconds['zeta']):5.2f} x zeta"
        )
        if name in makers:
            line += f"  {memory_in_subprocess(name, options):5.2f} GiB"
        print(line)
    peer = next(name for name in steps if name.startswith("vit-pytorch"))
    results = {
        "timm": ratio(seconds["timm"], seconds["zeta"]),
        "vit-pytorch": ratio(seconds[peer], seconds["zeta"]),
        "vit-pytorch, both from lists": ratio(seconds[peer], seconds["zeta/list"]),
        "products": ratio(seconds["products"], seconds["zeta, no update"]),
    }
    for name, value in results.items():
        floor = FLOORS.get((options.dtype, name))
        note = "" if floor is None else f"  (quiet machine: at least {floor})"
        print(f"{name:30} {value:5.2f}{note}")


def only_best_grouping(steps: dict[str, Callable[[], object]]) -> None:
    """Keep the fastest of vit-pytorch's variants, by two rounds each."""
    variants = {name: step for name, step in steps.items() if name.startswith("vit-pytorch")}
    seconds = {name: min(times) for name, times in interleave(variants, 2, warmup=1).items()}
    best = min(seconds, key=seconds.__getitem__)
    print("vit-pytorch:", ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
    for name in variants:
        if name != best:
            del steps[name]


def peak_memory(make: Callable[[], Contestant], work: workload.Workload, dtype: torch.dtype) -> int:
    """Bytes by which two steps raise this process's peak memory."""
    step = train_step(make(), work.labels, dtype)
    before = high_water_mark()
    step()
    step()
    return high_water_mark() - before


def high_water_mark() -> int:
    """Bytes of this process's largest resident size so far (Linux)."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory_in_subprocess(name: str, options: argparse.Namespace) -> float:
    """GiB of the activations, gradients and optimizer state of one contestant, by itself."""
    arguments = ["--dtype", options.dtype, "--images", str(options.images), "--memory-of", name]
    command = [sys.executable, "-m", "tests.benchmarks.train_step", *arguments]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(output.split()[-1]) / 2**30


if __name__ == "__main__":
    main()
