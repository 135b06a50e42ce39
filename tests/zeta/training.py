"""What the tests of training share: synthetic packs, and real ranks over gloo on loopback."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from tests.zeta.packs import make_pack
from zeta.packed import Rejected, StepPacks, lanes_of_rank, packs_per_rank

ROOT = Path(__file__).parents[2]
NUM_CLASSES = 5
BUDGET = 48
MAX_IMAGES = 4


def tiny_navit(seed=0, **changes):
    """A NaViT of a few thousand parameters, the same on every call."""
    from zeta import NaViT

    arguments = {"image_size": 16, "patch_size": 4, "num_classes": NUM_CLASSES, "dim": 16}
    arguments |= {"depth": 2, "heads": 2, "dim_head": 8, "mlp_dim": 32, "channels": 1}
    return NaViT(**(arguments | changes), seed=seed)


def lane_pack(step, lane, images=None):
    """The pack of one lane at one step: 0 to 4 images (lane 0: 1 to 4), a function of both."""
    generator = torch.Generator().manual_seed(1000 * step + lane)
    count = max((step + 3 * lane) % 5, int(lane == 0)) if images is None else images
    sizes = torch.randint(1, 4, (count, 2), generator=generator) * 4
    made = [
        torch.randint(0, 256, (1, int(h), int(w)), generator=generator).to(torch.uint8)
        for h, w in sizes
    ]
    pack = make_pack(made, patch_size=4, budget=BUDGET, max_images=MAX_IMAGES)
    if not made:
        pack = replace(pack, patches=torch.zeros(BUDGET, 16, dtype=torch.uint8))
    labels = torch.randint(0, NUM_CLASSES, (MAX_IMAGES,), generator=generator)
    used = pack.weights > 0
    ids = torch.arange(MAX_IMAGES) + 100 * (step * 16 + lane)
    return replace(
        pack, labels=torch.where(used, labels, -1), sample_ids=torch.where(used, ids, -1)
    )


class SyntheticSource:
    """A StepSource whose every pack is a function of (step, lane), with a state to check."""

    def __init__(self, rank, world_size, packs_per_step, epoch_steps=None, reject_at=()):
        self.rank, self.world_size, self.packs_per_step = rank, world_size, packs_per_step
        self.epoch_steps, self.reject_at = epoch_steps, reject_at
        self.lanes = range(rank, packs_per_step, world_size)
        self.yielded = -1

    def steps(self, state):
        step = 0 if state is None else next(iter(state["lanes"].values()))["steps"]
        if state is not None:
            assert sorted(state["lanes"], key=int) == [str(i) for i in range(self.packs_per_step)]
        while True:
            self.yielded = step
            yield self._packs(step)
            step += 1

    def state_after(self, step):
        if step > self.yielded:
            raise KeyError(step)
        return {"lanes": {str(lane): {"steps": step + 1} for lane in self.lanes}}

    def _packs(self, step):
        ended = self.epoch_steps is not None and step >= self.epoch_steps
        packs = [lane_pack(step, lane, images=0 if ended else None) for lane in self.lanes]
        missing = packs_per_rank(self.packs_per_step, self.world_size) - len(packs)
        packs += [lane_pack(step, 0, images=0)] * missing
        rejected = ()
        if step in self.reject_at:
            weights = packs[0].weights.clone()
            weights[0] = 0
            packs[0] = replace(packs[0], weights=weights)
            rejected = (Rejected(7, "key7", "shard.tar", "truncated"),)
        more = self.epoch_steps is None or step + 1 < self.epoch_steps
        return StepPacks(
            step=step,
            packs=tuple(packs),
            lanes=tuple(lanes_of_rank(self.rank, self.world_size, self.packs_per_step)),
            num_images=sum(pack.num_images for pack in packs),
            num_tokens=sum(pack.num_tokens for pack in packs),
            epoch=step // (self.epoch_steps or 10**9),
            more=more,
            rejected=rejected,
        )


def shard_small_parameters():
    """Let ZeRO-3 shard the parameters of a tiny model; else it keeps those under 100,000 whole."""
    import zeta.zero.engine

    original = zeta.zero.engine.deepspeed_config

    def config(train, world_size):
        made = original(train, world_size)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    zeta.zero.engine.deepspeed_config = config


def free_port():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return holder.getsockname()[1]


def start_ranks(module, world_size, arguments, *, path=None, environment=None):
    """Start `python -m module ARGUMENTS` once a rank; returns the processes."""
    port = str(free_port())
    processes = []
    for rank in range(world_size):
        variables = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
        variables |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        variables |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
        variables |= {"MASTER_PORT": port, **(environment or {})}
        if path is not None:
            variables["PATH"] = path
        command = [sys.executable, "-m", module, json.dumps(arguments)]
        processes.append(
            subprocess.Popen(
                command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    return processes


def finish(processes, timeout=300):
    """Wait for all; returns exit codes and outputs."""
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def run_ranks(module, world_size, arguments, **options):
    """Run to the end; fails the test with the output of a rank that fails."""
    codes, outputs = finish(start_ranks(module, world_size, arguments, **options))
    for rank, (code, output) in enumerate(zip(codes, outputs, strict=True)):
        assert code == 0, f"rank {rank} exited with {code}:\n{output[-6000:]}"
    return outputs
