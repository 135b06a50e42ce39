"""Measure the overhead of a training step of `navit_s16`, and how long a checkpoint blocks.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.step_overhead [--steps N] [--images N] [--saves N]

One CPU process through DeepSpeed, as `zeta train` runs it. Overhead is the time of a step outside
forward, backward, optimizer and collectives, as a median over the steps. What training waits for a
checkpoint is compared with writing files of the same sizes to the same disk, each with an fsync,
and keeping as many sets of them; in turns, medians. Bounds are printed for comparison.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tests.benchmarks.workload import realistic
from zeta.models.config import ModelConfig, build_model
from zeta.objectives import build_objective
from zeta.objectives.config import ObjectiveConfig
from zeta.packed import StepPacks
from zeta.run.console import Console
from zeta.run.directory import RunDir
from zeta.tracking.config import TrackerConfig, WandbConfig
from zeta.train.config import OptimConfig, TrainConfig
from zeta.zero.start import close_distributed, init_distributed

MOST_OVERHEAD, MOST_BLOCKING = 0.03, 1.2


class OnePack:
    """The same pack at every step, at no cost."""

    def __init__(self, images):
        self.pack = realistic(images).pack()

    def steps(self, state):
        step = 0
        while True:
            images, tokens = self.pack.num_images, self.pack.num_tokens
            yield StepPacks(step, (self.pack,), (0,), images, tokens, epoch=0, more=True)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--saves", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder:
        console = Console(Path(folder, "log"), 0)
        world = init_distributed(device_kind="cpu")
        try:
            trainer = build(world, console, Path(folder), options)
            shares = overheads(trainer)
            seconds = checkpoints(trainer, Path(folder), options.saves)
        finally:
            close_distributed()
            console.close()
    overhead = statistics.median(shares)
    print(f"overhead of a step     {overhead:.2%} (at most {MOST_OVERHEAD:.0%})")
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    blocking = median["blocked"] / median["plain write"]
    print(f"checkpoint / write     {blocking:.2f} (at most {MOST_BLOCKING})")
    for kind, values in seconds.items():
        print(f"{kind:22} {median[kind]:.2f} s  {[round(value, 2) for value in values]}")


def build(world, console, folder, options):
    from zeta.train.trainer import Trainer

    train = TrainConfig(packs_per_step=1, max_steps=options.steps + 2, dtype="bf16", log_every=10)
    train.checkpoint_every = None
    model = ModelConfig(preset="navit_s16", num_classes=1000)
    return Trainer(
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


def overheads(trainer):
    """The shares of the steps that are outside of their work."""
    work, shares, last = Stopwatch(), [], [time.perf_counter()]
    for name in ("forward", "backward", "step"):
        work.wrap(trainer.engine.sharded.deepspeed, name)
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
    return shares[2:]


def checkpoints(trainer, folder, rounds):
    """Seconds of each kind, round by round: after a save has filled what the next ones use again.

    blocked: what training waits for, while the disk has time between two steps; whole: until it is
    published; last: that of a checkpoint which training waits for, as at the end of a run.
    """
    seconds = {"blocked": [], "whole": [], "last": [], "plain write": []}
    for _ in range(rounds + 1):
        began = time.perf_counter()
        blocked = save(trainer, between=True)
        whole = time.perf_counter() - began
        newest = max(trainer.run_dir.checkpoints.glob("step_*"))
        sizes = [file.stat().st_size for file in newest.rglob("*") if file.is_file()]
        last = save(trainer, between=False)
        plain = plain_write(folder / "plain", sizes, trainer.train.keep_last)
        for values, value in zip(seconds.values(), (blocked, whole, last, plain), strict=True):
            values.append(value)
    return {kind: values[1:] for kind, values in seconds.items()}


def save(trainer, *, between):
    """Seconds that training is blocked by a checkpoint; `between`: it is written meanwhile."""
    trainer.progress.step += 1  # each save has a name of its own
    began = time.perf_counter()
    trainer._begin_save()
    blocked = time.perf_counter() - began
    while between and trainer.checkpoints.is_writing:
        time.sleep(0.01)
    began = time.perf_counter()
    assert trainer._finish_save() is None
    return blocked + time.perf_counter() - began


def plain_write(folder, sizes, keep):
    """Seconds to write files of `sizes` and to wait for the disk; `keep` sets of them stay."""
    folder.mkdir(exist_ok=True)
    sets = sorted(folder.iterdir(), key=lambda path: int(path.name))
    target = folder / str(int(sets[-1].name) + 1 if sets else 0)
    block = memoryview(os.urandom(2**24))
    began = time.perf_counter()
    target.mkdir()
    for number, size in enumerate(sizes):
        with (target / str(number)).open("wb") as file:
            for start in range(0, size, len(block)):
                file.write(block[: size - start])
            file.flush()
            os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    for old in [*sets, target][:-keep]:
        shutil.rmtree(old)
    return seconds


if __name__ == "__main__":
    main()
