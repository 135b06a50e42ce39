"""Time and memory of a training step by `model.position`, beside `fractional`, on the CPU.

    python -m tests.benchmarks.positions [--preset navit_s16] [--images 24] [--rounds 6]

Same images (realistic mix of sizes, side 64 to 256 pixels, patch 16), weights, and process.
Processor seconds of forward, backward and AdamW, medians over rounds of the ratio to `fractional`;
memory is the peak of activations as `zeta.train.memory_model` counts it. Prints a table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from tests.benchmarks import workload
from tests.benchmarks.timing import train_step
from zeta.models.config import ModelConfig, build_model
from zeta.train.memory_model import activation_memory, sum_of_outputs

POSITIONS = ("fractional", "rope", "rope+fractional", "grid_bicubic")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="navit_s16")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = workload.realistic(options.images)
    seconds = timed(options.preset, work, DTYPES[options.dtype], options.rounds)
    print(f"{options.preset}, {sum(work.lengths):,} tokens a step, {options.dtype}")
    print("| `model.position` | seconds of a step | time | activations, GiB | memory |")
    print("| --- | --- | --- | --- | --- |")
    sizes = {name: activations(options.preset, name, work, options.dtype) for name in POSITIONS}
    for name in POSITIONS:
        pairs = zip(seconds[name], seconds["fractional"], strict=True)
        print(
            f"| `{name}` | {statistics.median(seconds[name]):.2f} "
            f"| {statistics.median(own / base for own, base in pairs):.3f} "
            f"| {sizes[name] / 2**30:.3f} | {sizes[name] / sizes['fractional']:.3f} |"
        )


def timed(
    preset: str, work: workload.Workload, dtype: torch.dtype, rounds: int
) -> dict[str, list[float]]:
    """Return the processor seconds of every round of each position; the first round is not one."""
    steps = {name: _step(preset, name, work, dtype) for name in POSITIONS}
    seconds: dict[str, list[float]] = {name: [] for name in POSITIONS}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def activations(preset: str, position: str, work: workload.Workload, dtype: str) -> int:
    """Return the largest number of live bytes of activations of a step."""
    with torch.device("meta"):
        model = _model(preset, position)
    return activation_memory(model, work.pack(), sum_of_outputs, dtype).peak


def _step(
    preset: str, position: str, work: workload.Workload, dtype: torch.dtype
) -> Callable[[], None]:
    model, pack = _model(preset, position), work.pack()
    return train_step((model, lambda: model(pack)), work.labels, dtype)


def _model(preset: str, position: str) -> torch.nn.Module:
    return build_model(ModelConfig(preset=preset, num_classes=1000, position=position))


if __name__ == "__main__":
    main()
