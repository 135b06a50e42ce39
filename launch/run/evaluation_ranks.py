"""Evaluate on several ranks: run the same command once for each rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from launch.run.local import combined_exit_code
from launch.run.ranks import run_ranks, starter
from zeta.distributed import (
    LAUNCHED_RANKS,
    RankInfo,
    World,
    rank_from_environment,
)
from zeta.run.meeting import meet, wait_for_ranks
from zeta.zero.start import close_distributed, init_distributed


def has_ranks_to_start(nproc: int) -> bool:
    """Return whether this process has to start the ranks, and is not a rank itself.

    Raises:
        ValueError: it is one of several tasks of Slurm, which all have the same arguments.
    """
    if nproc == 1 or LAUNCHED_RANKS in os.environ or "RANK" in os.environ:
        return False
    return starter(os.environ).world_size == 1


def start_ranks(nproc: int) -> int:
    """Run the command of this process as `nproc` ranks; return the exit status of all."""
    outcome = run_ranks([sys.executable, "-P", "-m", "launch", *sys.argv[1:]], nproc)
    codes = [code for rank, code in enumerate(outcome.codes) if rank not in outcome.killed]
    return combined_exit_code(codes)


@contextmanager
def evaluation_world() -> Iterator[World]:
    """Yield the world of this process; a single rank needs no process group."""
    info = rank_from_environment(os.environ)
    if info.world_size == 1:
        yield World(RankInfo(), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    try:
        store = meet(info)
        wait_for_ranks(store, info)
        yield init_distributed(info, store=store)
    finally:
        close_distributed()
