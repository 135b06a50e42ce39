"""`zeta train`: one rank of a run; alone, or started by a launcher."""

from __future__ import annotations

import argparse
import os
import sys

from launch.arguments import Subparsers, add_command, add_config, positive_int
from zeta.run.signals import StopSignals
from zeta.train.hardware import accelerator


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "train",
        run,
        "train on this process alone, or as one rank of torchrun, srun or `zeta launch`",
        "zeta train navit_b16_classification data.shards=shards/train run.dir=runs/first",
    )
    add_config(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, train on one pack here, print steps and memory; start no run",
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="with --dry-run: the GPU of each rank, such as h100 or a100"
    )
    parser.add_argument(
        "--world-size",
        type=positive_int,
        metavar="W",
        help="with --dry-run: ranks of the run (default: 1)",
    )


def run(args: argparse.Namespace) -> int:
    """Train; the same command continues a run that was stopped."""
    if args.dry_run:
        return _dry_run(args)
    if args.gpu is not None or args.world_size is not None:
        raise ValueError(
            "--gpu and --world-size need --dry-run; a real run uses the GPUs and ranks it has"
        )
    # A signal before the first step, while torch loads or the ranks connect, is only recorded: the
    # trainer reads it, and all ranks stop together.
    with StopSignals(interrupts=False):
        return _train(args)


def _train(args: argparse.Namespace) -> int:
    from launch.config.destinations import check_destinations
    from launch.config.load import load_config

    try:
        config = load_config(args.config, args.overrides)
        check_destinations(config)
    except ValueError as error:
        from launch.run.consensus import refuse_together

        return refuse_together(error)
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print("zeta: loading PyTorch and DeepSpeed", file=sys.stderr, flush=True)
    from launch.run.train import (
        train,  # loads torch and DeepSpeed: after the config has been checked
    )

    return train(config)


def _dry_run(args: argparse.Namespace) -> int:
    from launch.config.load import load_config

    gpu = None if args.gpu is None else accelerator(args.gpu)
    config = load_config(args.config, args.overrides)
    from launch.run.dry_run import dry_run

    return dry_run(config, args.world_size or 1, gpu)
