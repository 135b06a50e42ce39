"""`zeta report`: the page that shows what a run did."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.arguments import Subparsers, add_command


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "report",
        run,
        "write one self-contained HTML page about a run, finished or not",
        "zeta report runs/demo",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="directory of the run")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write (default: RUN_DIR/report.html)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the report and print its path."""
    from launch.first_pack import draw_first_pack
    from launch.report import write_report
    from zeta.run_dir import RunDir

    run_dir = RunDir(args.run_dir)
    if run_dir.config.is_file() and not run_dir.pack_picture.exists():
        try:
            draw_first_pack(run_dir)
        except ValueError as error:  # the report is about the run, which may outlive its shards
            print(f"without a picture of a pack: {error}")
    print(write_report(args.run_dir, args.out))
    return 0
