"""`zeta launch preflight`: are the nodes of a Slurm job fit to train?"""

from __future__ import annotations

import argparse

from launch.arguments import Subparsers, add_command, add_config


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "preflight",
        run,
        "check the nodes of a Slurm job before it trains, one task a node; names the bad ones",
        "srun --ntasks-per-node=1 zeta launch preflight navit_b16_classification "
        "data.shards=shards/train",
    )
    add_config(parser)


def run(args: argparse.Namespace) -> int:
    """Check this node; slurm/pretrain.sbatch runs it before it starts the ranks."""
    from launch.config import load_config
    from launch.preflight import preflight

    return preflight(load_config(args.config, args.overrides))
