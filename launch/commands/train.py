"""`zeta train`: one rank of a run; alone, or started by a launcher."""

from __future__ import annotations

import argparse

from launch.arguments import Subparsers, add_command, add_config


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "train",
        run,
        "train on this process alone, or as one rank of torchrun, srun or `zeta launch`",
        "zeta train navit_b16_classification data.shards=shards/train run.dir=runs/first",
    )
    add_config(parser)


def run(args: argparse.Namespace) -> int:
    """Train; the same command continues a run that was stopped."""
    from launch.config import load_config

    config = load_config(args.config, args.overrides)
    from launch.train import train  # loads torch and DeepSpeed: after the config has been checked

    return train(config)
