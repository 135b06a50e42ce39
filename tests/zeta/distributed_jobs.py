"""Jobs of test_distributed."""

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist

from zeta.distributed import set_collective_timeout
from zeta.run.cpu_tuning import gather_in_place
from zeta.zero.start import close_distributed, init_distributed


def collectives(arguments):
    """Every collective once; prints what this rank got."""
    world = init_distributed()
    got = {
        "sum": world.sum([1, 2.0]),
        "all": [world.all(world.rank != 1), world.all(True)],
        "gather": world.gather(f"rank {world.rank}"),
        "broadcast": world.broadcast(f"from {world.rank}"),
    }
    world.barrier()
    close_distributed()
    print(json.dumps(got))


def timeouts(arguments):
    """Rank 1 comes a second late to one collective, and 6 seconds late to the next."""
    world = init_distributed()
    set_collective_timeout(30)
    if world.rank == 1:
        time.sleep(1.5)
    patient = world.sum([1.0]) == [2.0]
    set_collective_timeout(1)
    if world.rank == 1:
        time.sleep(6)
        return
    began = time.monotonic()
    try:
        world.sum([1.0])
    except RuntimeError:
        Path(arguments["out"]).write_text(json.dumps([patient, time.monotonic() - began]))


def gathers(arguments):
    """DeepSpeed gathers by our function, which gathers what torch's does, input in place or not."""
    world = init_distributed()
    from deepspeed.comm import comm

    assert comm.cdb.all_gather_function is gather_in_place
    generator = torch.Generator().manual_seed(world.rank)
    for dtype in (torch.float32, torch.bfloat16):
        part = torch.randn(5, 1001, generator=generator).to(dtype)
        part[0, :3] = torch.tensor([-0.0, float("nan"), float("inf")])
        expected, apart, inside = (torch.empty(world.size * 5, 1001, dtype=dtype) for _ in range(3))
        dist.all_gather_into_tensor(expected, part)
        gather_in_place(apart, part)
        own = inside.view(-1).chunk(world.size)[world.rank]
        own.copy_(part.view(-1))
        gather_in_place(inside, own)
        later = torch.empty_like(expected)
        gather_in_place(later, part, async_op=True).wait()
        for got in (apart, inside, later):
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    close_distributed()
