"""`zeta finetune`: train an export on labelled images."""

from __future__ import annotations

import argparse

from launch.arguments import (
    Subparsers,
    add_command,
    add_export,
    add_settings,
    expanded,
    positive_int,
)


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "finetune",
        run,
        "train an export on labelled images: all of it, its last blocks, or a new head alone",
        "zeta finetune exports/first path/to/images --mode probe",
    )
    add_export(parser)
    parser.add_argument(
        "config",
        metavar="CONFIG|IMAGES",
        type=expanded,
        help="a folder of images (its subfolders are the classes), a .csv or .jsonl table of them, "
        "shards, or a YAML file as for zeta train",
    )
    add_settings(parser, "the recipe")
    parser.add_argument(
        "--mode",
        metavar="MODE",
        help="full; probe: a new head, fitted to features that are computed once; last-K: the last "
        "K blocks, as in last-2 (default: full)",
    )
    parser.add_argument(
        "--nproc",
        type=positive_int,
        metavar="N",
        help="ranks to start on this machine (default: this process alone, or one rank of torchrun "
        "or srun)",
    )
    parser.add_argument(
        "--val-share",
        type=float,
        default=0.1,
        metavar="X",
        help="share of a folder's images to hold out, for the scores (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Fine-tune; the same command continues a run that was stopped."""
    from launch.recipes.finetune import finetune

    return finetune(
        args.export,
        args.config,
        args.overrides,
        mode=args.mode,
        nproc=args.nproc,
        val_share=args.val_share,
    )
