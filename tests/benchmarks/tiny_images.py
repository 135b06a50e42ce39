"""Training step on 512 tiny images: zeta's packing against a plain padded ViT, on the CPU.

    python -m tests.benchmarks.tiny_images [--dtype bf16|fp32] [--rounds 10]

All images are 32 x 32 pixels (4 patches of 16), the best case of a padded batch: it has no padding
at all, so whatever packing costs shows.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from tests.benchmarks import contestants, workload
from tests.benchmarks.timing import interleave, ratio, train_step
from tests.benchmarks.train_step import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = workload.of_shapes([(32, 32)] * options.images)
    dtype = DTYPES[options.dtype]
    built = {
        "zeta": contestants.zeta_pack(work),
        "zeta/list": contestants.zeta_list(work),
        "padded ViT": contestants.padded_vit(work),
        "vit-pytorch NaViT": contestants.lucid(work, 64),
    }
    steps = {name: train_step(one, work.labels, dtype) for name, one in built.items()}
    seconds = interleave(steps, options.rounds)
    print(f"{options.dtype}, {options.threads} threads, {options.images} images of 4 patches")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:20} median {median:.3f} s, least {min(times):.3f} s  "
            f"{len(work.images) / median:7.1f} images/s"
        )
    speedups = [ratio(seconds["padded ViT"], seconds[name]) for name in ("zeta", "zeta/list")]
    print(f"padded ViT's time over zeta's: {speedups[0]:.2f} (pack), {speedups[1]:.2f} (list)")


if __name__ == "__main__":
    main()
