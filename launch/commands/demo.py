"""`zeta demo`: run the whole pipeline once, on small images."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.arguments import Subparsers, add_command, add_settings, output_path


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "demo",
        run,
        "run the whole pipeline on scanned digits: shards, packs, training, export, evaluation",
        "zeta demo --out runs/demo",
    )
    parser.add_argument(
        "--out", type=output_path, default=Path("runs/demo"), help="folder (default: runs/demo)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of data and weights (default: 0)")
    add_settings(parser, "the recipe demo")


def run(args: argparse.Namespace) -> int:
    """Run the demo; the same command continues an interrupted one."""
    from launch.recipes.demo import run_demo

    return run_demo(args.out, args.seed, args.overrides)
