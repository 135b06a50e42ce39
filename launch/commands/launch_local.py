"""`zeta launch local`: train on several ranks on this machine."""

from __future__ import annotations

import argparse

from launch.arguments import Subparsers, add_command, add_config, non_negative_int, positive_int
from launch.run.restarts import MAX_RESTARTS, MAX_STALLED


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
    parser.add_argument(
        "--max-restarts",
        type=non_negative_int,
        default=MAX_RESTARTS,
        metavar="N",
        help="start a run that crashed again from its newest checkpoint, N times at most (default: "
        f"{MAX_RESTARTS}; 0: never), and give up after {MAX_STALLED} starts in a row without a new "
        "one. A run that finished, that a restart would not help, or that was asked to stop "
        "(Ctrl-C, or SIGTERM to this command) is not started again",
    )


def run(args: argparse.Namespace) -> int:
    """Start the ranks, again if need be, wait for them and return the status of the run."""
    from launch.run.local import launch_local

    return launch_local(args.config, args.overrides, args.nproc, args.max_restarts)
