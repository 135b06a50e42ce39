"""What the sections share: options, packs of a number of tokens, times of host and device."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.benchmarks import workload
from zeta.models.config import ModelConfig, build_model
from zeta.train.hardware import find_accelerator

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    device: str
    toy: bool
    out: Path

    @classmethod
    def of(cls, parsed: argparse.Namespace) -> Options:
        return cls(parsed.device, parsed.toy, Path(parsed.out))

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def tokens(self, count: int) -> int:
        return 128 if self.toy else count

    def peak_tflops(self) -> float | None:
        if not self.cuda:
            return None
        found = find_accelerator(torch.cuda.get_device_name())
        return None if found is None else found.peak_tflops("bf16")


def guarded(cases: Iterable[tuple[str, Callable[[], Row]]]) -> Iterator[Row]:
    """The row of each case; of one that fails, its error. The others go on."""
    for name, case in cases:
        try:
            row = case()
        except Exception as error:
            row = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        yield {"case": name, **row}
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()


def config(preset: str, options: Options) -> ModelConfig:
    """The preset at 16-pixel patches; toy: two layers of the smallest."""
    if options.toy:
        return ModelConfig(preset="navit_ti16", depth=2, num_classes=1000)
    return ModelConfig(preset=preset, num_classes=1000, patch_size=16, image_size=256)


def build(preset: str, options: Options) -> nn.Module:
    return build_model(config(preset, options)).to(options.device).train()


def photographs(tokens: int, largest: int = 256) -> workload.Workload:
    """Images of real sizes that together have at most `tokens` tokens."""
    made = workload.realistic(max(4, tokens // 90), 0, 64, largest)
    images, used = [], 0
    for image, length in zip(made.images, made.lengths, strict=True):
        if used + length <= tokens:
            images.append(image)
            used += length
    return workload.Workload(images, made.labels[: len(images)])


def timed(step: Callable[[], object], options: Options, rounds: int = 8) -> Row:
    """Milliseconds of a step, and of the host alone until it has launched everything."""
    rounds, warmup = (1, 1) if options.toy else (rounds, 3)
    for _ in range(warmup):
        step()
    wait(options)
    if options.cuda:
        torch.cuda.reset_peak_memory_stats()
    whole, host = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        step()
        host.append(1e3 * (time.perf_counter() - began))
        wait(options)
        whole.append(1e3 * (time.perf_counter() - began))
    row = {"ms": statistics.median(whole), "host_ms": statistics.median(host)}
    if options.cuda:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def wait(options: Options) -> None:
    if options.cuda:
        torch.cuda.synchronize()


def rates(row: Row, images: int, flops: float, options: Options) -> Row:
    """Add images a second, useful TFLOP/s, and their share of the card's peak."""
    seconds = row["ms"] / 1e3
    row |= {"images_per_s": images / seconds, "tflops": flops / seconds / 1e12}
    peak = options.peak_tflops()
    return row | ({} if peak is None else {"mfu": row["tflops"] / peak})
