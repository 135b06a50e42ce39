"""`zeta launch watch`: follow how a run is doing."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.arguments import Subparsers, add_command


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "watch",
        run,
        "follow how a run is doing until it is finished, from before it has begun if need be; "
        "Ctrl-C stops watching, not the run",
        "zeta launch watch runs/first",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="directory of the run")
    parser.add_argument(
        "--every",
        type=_seconds,
        default=5.0,
        metavar="S",
        help="seconds between two updates (default: 5)",
    )


def run(args: argparse.Namespace) -> int:
    """Show the status until the run is finished."""
    from launch.status.snapshot import take_snapshot
    from launch.status.state import judge
    from launch.status.view import Screen, wait_for_run, watch

    if wait_for_run(args.run_dir, args.every):
        watch(lambda: judge(take_snapshot(args.run_dir)), args.every, Screen())
    return 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.2 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.2 to 86400")
    return seconds
