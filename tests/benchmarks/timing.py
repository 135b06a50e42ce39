"""Interleaved timing: every contestant runs once per round, so that noise hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from tests.benchmarks.contestants import Contestant


def train_step(
    contestant: Contestant, labels: torch.Tensor, dtype: torch.dtype, *, update: bool = True
) -> Callable[[], None]:
    """Forward, cross-entropy, backward and (with `update`) AdamW of one contestant."""
    model, logits = contestant
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = logits()
        F.cross_entropy(out.float(), labels).backward()
        if update:
            optimizer.step()
        optimizer.zero_grad()

    return step


def interleave(
    steps: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every round of every step, after some rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warmup + rounds):
        for name, step in steps.items():
            gc.collect()
            start = time.perf_counter()
            step()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over rounds of slow / fast: a slow stretch of the machine cancels within its round."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))
