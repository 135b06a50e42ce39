"""`zeta launch slurm`: submit a run to a Slurm cluster."""

from __future__ import annotations

import argparse

from launch.arguments import Subparsers, add_command, add_config, add_json, positive_int
from launch.config.cluster_options import add_cluster_options, with_cluster_settings


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "slurm",
        run,
        "submit a run to Slurm",
        "zeta launch slurm navit_b16_classification --nodes 2 --gpus-per-node 8 \\\n"
        "    --partition gpus --time 24:00:00 data.shards=/data/train run.dir=/shared/b16",
    )
    parser.description = (
        "Submit a run to Slurm. Print job id, log, how to follow the run, and its W&B page if\n"
        "tracker.wandb.entity or WANDB_ENTITY is set."
    )
    add_config(parser)
    add_cluster_options(parser)
    parser.add_argument(
        "--chain",
        type=positive_int,
        metavar="K",
        help="where jobs cannot be requeued: submit K jobs, to run one after another",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print command and script (with --json the words of the command), submit nothing",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Check the run as its ranks would, submit it, and print how to follow it."""
    from launch.cluster.submission import submit_run  # loads torch

    return submit_run(
        args.config,
        with_cluster_settings(args),
        chain=args.chain,
        dry_run=args.dry_run,
        as_json=args.json,
    )
