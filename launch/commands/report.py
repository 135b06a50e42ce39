"""`zeta report`: write an HTML page about a run."""

from __future__ import annotations

import argparse
import sys

from launch.arguments import Subparsers, add_command, input_path, output_path
from launch.errors import USER_ERRORS, message


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "report",
        run,
        "write one self-contained HTML page about a run, finished or not, alone or with others",
        "zeta report runs/first --compare runs/second --axis tokens",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=input_path, help="directory of the run")
    parser.add_argument(
        "--compare",
        type=input_path,
        nargs="+",
        default=[],
        metavar="OTHER",
        help="directories of other runs, drawn into the same charts",
    )
    parser.add_argument(
        "--axis",
        default="step",
        metavar="AXIS",
        help="x-axis of the charts: step, tokens, images, or time (default: step)",
    )
    parser.add_argument(
        "--out",
        type=output_path,
        metavar="FILE",
        help="file to write (default: RUN_DIR/report.html)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the report and print its path."""
    from launch.report.derived_files import write_derived_files
    from launch.report.page import check_report, write_report
    from zeta.run.directory import RunDir

    check_report(args.run_dir, args.out, args.compare, args.axis)
    for path in (args.run_dir, *args.compare):
        run_dir = RunDir(path)
        if run_dir.config.is_file() and run_dir.metrics.is_file():
            try:
                write_derived_files(run_dir)
            except USER_ERRORS as error:  # a run may outlive its shards
                why = f"{path}: no new picture of a pack, nor image sizes: {message(error)}"
                print(why, file=sys.stderr)
    print(write_report(args.run_dir, args.out, args.compare, args.axis))
    return 0
