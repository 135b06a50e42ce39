"""`zeta launch status`: print how a run is doing."""

from __future__ import annotations

import argparse
import json

from launch.arguments import Subparsers, add_command, add_json, input_path


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "status",
        run,
        "print how a run is doing, from its files and the Slurm queue",
        "zeta launch status runs/first",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=input_path, help="directory of the run")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the status."""
    from launch.status.snapshot import take_snapshot
    from launch.status.state import judge
    from launch.status.view import status_lines, status_object

    status = judge(take_snapshot(args.run_dir))
    print(json.dumps(status_object(status)) if args.json else "\n".join(status_lines(status)))
    return 0
