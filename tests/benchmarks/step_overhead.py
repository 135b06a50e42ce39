"""What a training step of `navit_s16` costs besides its work, and how long a checkpoint blocks.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.step_overhead [--steps 10] [--images 8]

One CPU process through DeepSpeed, as `zeta train` runs it. Overhead is the time of a step outside
forward, backward, optimizer and collectives, as a median over the steps; a checkpoint is compared
with writing as many bytes to the same disk, in turns. Exits with 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.benchmarks.workload import realistic
from zeta.console import Console
from zeta.distributed import close_distributed, init_distributed
from zeta.models.config import ModelConfig, build_model
from zeta.objectives import build_objective
from zeta.objectives.config import ObjectiveConfig
from zeta.packed import StepPacks
from zeta.run_dir import RunDir
from zeta.train_config import OptimConfig, TrackerConfig, TrainConfig, WandbConfig

MOST_OVERHEAD, MOST_BLOCKING = 0.03, 1.2


class OnePack:
    """The same pack at every step, at no cost."""

    def __init__(self, images):
        self.pack = realistic(images).pack()

    def steps(self, state):
        step = 0
        while True:
            images, tokens = self.pack.num_images, self.pack.num_tokens
            yield StepPacks(step, (self.pack,), images, tokens, epoch=0, more=True)
            step += 1

    def state_after(self, step):
        return {"lanes": {}}  # known for any step


class Stopwatch:
    """Seconds inside of wrapped functions, nested ones counted once."""

    def __init__(self):
        self.seconds, self._depth = 0.0, 0

    def wrap(self, owner, name):
        original = getattr(owner, name)

        def timed(*args, **kwargs):
            began, self._depth = time.perf_counter(), self._depth + 1
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - began

        setattr(owner, name, timed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder:
        console = Console(Path(folder, "log"), 0)
        world = init_distributed(device_kind="cpu")
        try:
            shares, saves, writes = measure(world, console, Path(folder), options)
        finally:
            close_distributed()
            console.close()
    overhead = statistics.median(shares)
    blocking = statistics.median(a / b for a, b in zip(saves, writes, strict=True))
    print(f"overhead of a step   {overhead:.2%} (at most {MOST_OVERHEAD:.0%})")
    print(f"checkpoint / write   {blocking:.2f} (at most {MOST_BLOCKING}); {saves} {writes}")
    return int(overhead > MOST_OVERHEAD or blocking > MOST_BLOCKING)


def measure(world, console, folder, options):
    from zeta.trainer import Trainer

    train = TrainConfig(packs_per_step=1, max_steps=options.steps + 2, dtype="bf16", log_every=10)
    train.checkpoint_every = None
    model = ModelConfig(preset="navit_s16", num_classes=1000)
    trainer = Trainer(
        model=build_model(model),
        objective=build_objective(ObjectiveConfig(), 1000),
        source=OnePack(options.images),
        run_dir=RunDir(folder / "run"),
        world=world,
        console=console,
        train=train,
        optim=OptimConfig(schedule="constant"),
        tracker=TrackerConfig(WandbConfig(mode="disabled")),
        config={},
    )
    work, shares, last = Stopwatch(), [], [time.perf_counter()]
    for name in ("forward", "backward", "step"):
        work.wrap(trainer.engine.deepspeed, name)
    work.wrap(torch.distributed, "all_reduce")
    original = trainer._account

    def account(*args, **kwargs):
        original(*args, **kwargs)
        now = time.perf_counter()
        shares.append(1 - work.seconds / (now - last[0]))
        last[0], work.seconds = now, 0.0

    trainer._account = account
    trainer.ledger.close = trainer.sink.close = lambda: None  # saves follow
    trainer.fit()
    saves, writes = [], []
    for _ in range(3):
        trainer.progress.step += 1  # each save has a name of its own
        began = time.perf_counter()
        trainer._save()
        saves.append(round(time.perf_counter() - began, 2))
        newest = max(RunDir(folder / "run").checkpoints.glob("step_*"))
        size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
        writes.append(round(plain_write(folder / "bytes", size), 2))
    return shares[2:], saves, writes


def plain_write(path, size):
    """Seconds to write `size` bytes to a file and to wait for the disk."""
    block = os.urandom(2**24)
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
