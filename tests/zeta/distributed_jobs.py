"""Jobs of test_distributed."""

import json

from zeta.distributed import close_distributed, init_distributed


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
