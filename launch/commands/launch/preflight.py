"""`zeta launch preflight`: check that the nodes of a Slurm job are fit to train."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from types import FrameType

from launch.arguments import Subparsers, add_command, add_config


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "preflight",
        run,
        "check the nodes of a Slurm job before it trains, one task a node, and name the bad ones",
        "srun --ntasks-per-node=1 zeta launch preflight navit_b16_classification "
        "data.shards=shards/train",
    )
    add_config(parser)


def run(args: argparse.Namespace) -> int:
    """Check this node; slurm/pretrain.sbatch runs it before it starts the ranks."""
    # When a connection breaks, torch logs pages of C++ before zeta can explain it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Slurm ends a preflight with the same signals as ranks: nothing needs saving yet.
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, _leave)
    from launch.cluster.preflight import preflight  # loads torch
    from launch.config.load import load_config

    return preflight(load_config(args.config, args.overrides))


def _leave(_number: int, _frame: FrameType | None) -> None:
    from zeta.exit_codes import ExitCode

    sys.exit(ExitCode.REQUEUE)
