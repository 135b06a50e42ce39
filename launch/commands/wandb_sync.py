"""`zeta wandb-sync`: send what Weights & Biases lacks of a run."""

from __future__ import annotations

import argparse

from launch.arguments import Subparsers, add_command, input_path


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "wandb-sync",
        run,
        "send what Weights & Biases lacks of a run: offline sessions, and the rest",
        "zeta wandb-sync runs/first",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=input_path, help="directory of the run")


def run(args: argparse.Namespace) -> int:
    """Send what is missing, and print how."""
    from launch.status.wandb_sync import wandb_sync

    return wandb_sync(args.run_dir)
