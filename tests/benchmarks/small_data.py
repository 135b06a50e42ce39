"""Does the initialisation learn fast on small data? Position tables of three kinds on digits.

    python -m tests.benchmarks.small_data [--steps 300] [--seeds 3]

A small NaViT learns scanned digits that are stretched to sizes of their own for a fixed number of
steps. All else being equal, its position tables start as zeta makes them, as white noise of unit
variance, and as white noise of deviation 0.02, the usual choice. Prints the accuracy on held-out
scans.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from zeta import NaViT

PATCH, BATCH, LR = 8, 32, 2e-3
SIDES = (24, 32, 40, 48, 64)
"""Pixels of a side, drawn for height and width apart."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    means = {}
    for tables in ("zeta", "white 1", "white 0.02"):
        scores = [accuracy_after(options.steps, tables, seed) for seed in range(options.seeds)]
        means[tables] = statistics.mean(scores)
        listed = ", ".join(f"{score:.1%}" for score in scores)
        print(f"{tables:10} {means[tables]:.1%} after {options.steps} steps ({listed})", flush=True)


def accuracy_after(steps: int, tables: str, seed: int) -> float:
    """Share of the held-out digits that a model knows after this many steps."""
    torch.manual_seed(seed)
    model = NaViT(64, PATCH, 10, dim=64, depth=4, heads=4, mlp_dim=256, dim_head=16, seed=seed)
    if tables != "zeta":
        for table in (model.embeds.pos_embed_y, model.embeds.pos_embed_x):
            torch.nn.init.normal_(table, std=float(tables.split()[1]))
    (train_scans, train_labels), (val_scans, val_labels) = digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05)
    for step, rows in enumerate(batches(len(train_scans), steps)):
        for group in optimizer.param_groups:
            group["lr"] = LR * rate(step, steps)
        logits = model(pictures(train_scans[rows]))
        F.cross_entropy(logits, train_labels[rows], label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.manual_seed(1)  # every model is judged on the same sizes
    with torch.no_grad():
        right = model(pictures(val_scans)).argmax(dim=1) == val_labels
    return right.float().mean().item()


def rate(step: int, steps: int) -> float:
    """Tenth of the steps of warm-up, then half a cosine to 0."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Scans [N, 1, 8, 8] of ink from -1 to 1 and labels [N]: to train on, and every fifth."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    inks = torch.tensor(scans, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    held_out = torch.arange(len(inks)) % 5 == 0
    classes = torch.tensor(labels)
    return (inks[~held_out], classes[~held_out]), (inks[held_out], classes[held_out])


def batches(count: int, steps: int) -> Iterator[Tensor]:
    """Rows of each step, in an order drawn anew every epoch."""
    order = torch.randperm(count)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(count)
        yield order[:BATCH]
        order = order[BATCH:]


def pictures(scans: Tensor) -> list[Tensor]:
    """Every scan as a colour image of a height and a width of its own."""
    sides = torch.tensor(SIDES)[torch.randint(len(SIDES), (len(scans), 2))].tolist()
    return [
        F.interpolate(scan[None], size=size, mode="bilinear")[0].expand(3, -1, -1)
        for scan, size in zip(scans, sides, strict=True)
    ]


if __name__ == "__main__":
    main()
