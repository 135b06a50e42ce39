"""`zeta launch sizes`: the models that fit each GPU."""

from __future__ import annotations

import argparse

from launch.arguments import Subparsers, add_command, positive_int
from zeta.train.hardware import accelerator


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "sizes",
        run,
        "print the largest token budget by preset, GPU and ZeRO stage, without and with activation "
        "checkpointing; computed, nothing is started",
        "zeta launch sizes navit_b16 navit_l16 --world-size 16 --gpus a100 h100",
    )
    parser.add_argument("presets", metavar="PRESET", nargs="*", help="default: all")
    parser.add_argument(
        "--world-size", type=positive_int, default=8, metavar="W", help="ranks (default: 8)"
    )
    parser.add_argument(
        "--gpus",
        nargs="+",
        default=["l4", "a100-40gb", "h100", "h200"],
        metavar="NAME",
        help="GPUs of a rank (default: l4 a100-40gb h100 h200)",
    )
    parser.add_argument(
        "--optim",
        default="adamw",
        metavar="KIND",
        help="optim.kind, which says what is kept of each weight, and at which stages "
        "(default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    gpus = [accelerator(key) for key in args.gpus]
    from launch.cluster.sizing import sizing_table
    from zeta.models.presets import PRESETS
    from zeta.train.config import OptimConfig

    optim = OptimConfig(kind=args.optim)
    for line in sizing_table(args.presets or list(PRESETS), gpus, args.world_size, optim):
        print(line, flush=True)
    return 0
