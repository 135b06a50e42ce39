"""`zeta data audit`: prove that a run used every sample once an epoch."""

from __future__ import annotations

import argparse
import json

from launch.arguments import Subparsers, add_command, add_json, input_path


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "audit",
        run,
        "prove from a run's files that each sample was used once an epoch, or list the deviations",
        "zeta data audit runs/first",
    )
    parser.add_argument(
        "run_dir",
        metavar="RUN_DIR",
        type=input_path,
        help="directory of the run, finished or not",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the account of every epoch; exit with 1 if it is not exact."""
    from launch.status.audit import audit_run, audit_table, to_json

    audit = audit_run(args.run_dir)
    print(json.dumps(to_json(audit)) if args.json else "\n".join(audit_table(audit)))
    return 0 if audit.exact else 1
