"""`zeta launch doctor`: check whether a run will work on this cluster."""

from __future__ import annotations

import argparse

from launch.arguments import Subparsers, add_command, add_config
from launch.config.cluster_options import add_cluster_options, with_cluster_settings


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "doctor",
        run,
        "check everything that a run needs on this cluster, without submitting it",
        "zeta launch doctor navit_b16_classification --nodes 2 --gpus-per-node 8 \\\n"
        "    --partition gpus data.shards=/data/train run.dir=/shared/b16",
    )
    add_config(parser)
    add_cluster_options(parser)
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="the GPU of each rank, such as h100: says whether the loader can keep up with it",
    )


def run(args: argparse.Namespace) -> int:
    """Print a table of checks and return 1 if any failed."""
    from launch.cluster.doctor import examine
    from zeta.train.hardware import accelerator

    gpu = None if args.gpu is None else accelerator(args.gpu)
    failed = 0
    for check in examine(args.config, with_cluster_settings(args), gpu):
        failed += check.state == "failed"
        print(f"{check.state:<9}{check.subject:<15}{check.finding}", flush=True)
    if failed:
        print(f"\n{failed} check{'s' if failed > 1 else ''} failed")
    return 1 if failed else 0
