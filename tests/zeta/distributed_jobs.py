"""Jobs of test_distributed."""

import json
import time
from pathlib import Path

from zeta.distributed import close_distributed, init_distributed, set_collective_timeout


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
