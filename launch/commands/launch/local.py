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
        help="after a crash, restart from the newest checkpoint, at most N times (default: "
        f"{MAX_RESTARTS}; 0: never); give up after {MAX_STALLED} restarts in a row without a new "
        "checkpoint. A run that finished, that failed for a reason that no restart can change, or "
        "that was stopped (Ctrl-C, or SIGTERM to this command) is not restarted",
    )


def run(args: argparse.Namespace) -> int:
    """Start the ranks, restart them after a crash, and return the exit status of the run."""
    from launch.run.local import launch_local

    return launch_local(args.config, args.overrides, args.nproc, args.max_restarts)
