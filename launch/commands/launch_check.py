"""`zeta launch check`: is a config right, and where will its run be?"""

from __future__ import annotations

import argparse

from launch.arguments import Subparsers, add_command, add_config


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "check",
        run,
        "check a config without starting anything, and print its run directory",
        "zeta launch check navit_b16_classification data.shards=shards/train",
    )
    add_config(parser)


def run(args: argparse.Namespace) -> int:
    """Print the run directory; slurm/pretrain.sbatch reads it before it starts the ranks."""
    from launch.config import load_config

    print(load_config(args.config, args.overrides).run.dir)
    return 0
