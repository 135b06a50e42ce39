"""`zeta launch local`: train on several ranks on this machine."""

from __future__ import annotations

import argparse

from launch.arguments import Subparsers, add_command, add_config, positive_int


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "local",
        run,
        "train on several ranks on this machine",
        "zeta launch local demo --nproc 2 data.shards=my/shards train.max_steps=200",
    )
    add_config(parser)
    parser.add_argument(
        "--nproc", type=positive_int, required=True, metavar="N", help="number of ranks"
    )


def run(args: argparse.Namespace) -> int:
    """Start the ranks, wait for them and return the status of the run."""
    from launch.local import launch_local

    return launch_local(args.config, args.overrides, args.nproc)
