"""`zeta report`: the page that shows what a run did."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "report",
        help="write report.html for a run",
        description="Write one self-contained page about a run, finished or not: loss, throughput, "
        "fill, evaluation, a picture of a pack, quarantine and config. It opens from disk.",
        epilog="example: zeta report runs/demo",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="directory of the run")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write (default: RUN_DIR/report.html)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report and print its path."""
    from launch.report import write_report

    print(write_report(args.run_dir, args.out))
    return 0
