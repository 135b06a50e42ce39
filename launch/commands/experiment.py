"""`zeta experiment`: compare NaViT with ViTs of one size, at equal compute, on your images."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.arguments import (
    Subparsers,
    add_command,
    add_settings,
    expanded,
    output_path,
    positive_int,
)


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "experiment",
        run,
        "train NaViT and ViTs of one image size with equal compute, and compare their accuracy",
        "zeta experiment photos --out runs/experiment --seeds 3",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        type=expanded,
        nargs="?",
        help="folder of images, its subfolders the classes (default: the digits of zeta demo)",
    )
    parser.add_argument(
        "--out",
        type=output_path,
        default=Path("runs/experiment"),
        help="folder (default: runs/experiment)",
    )
    parser.add_argument(
        "--sizes",
        type=_sides,
        metavar="SMALL,LARGE",
        help="sides in pixels of the two ViTs of one size, as in 96,224 for photographs; NaViT's "
        "go from a third of the larger one to it (default: 48,96, for small images)",
    )
    parser.add_argument(
        "--seeds",
        type=positive_int,
        default=1,
        metavar="N",
        help="number of runs of each arm (default: 1)",
    )
    parser.add_argument(
        "--nproc",
        type=positive_int,
        default=2,
        metavar="N",
        help="number of ranks of a run (default: 2)",
    )
    add_settings(parser, "all arms")


def run(args: argparse.Namespace) -> int:
    """Run the experiment; the same command continues an interrupted one."""
    from launch.recipes.experiment import run_experiment

    if args.source is not None and "=" in args.source and not Path(args.source).exists():
        args.overrides, args.source = [args.source, *args.overrides], None
    return run_experiment(
        args.source,
        args.out,
        seeds=args.seeds,
        nproc=args.nproc,
        overrides=args.overrides,
        sizes=args.sizes,
    )


def _sides(text: str) -> tuple[int, int]:
    numbers = [part.strip() for part in text.split(",")]
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not two sides in pixels, as in 96,224")
    return int(numbers[0]), int(numbers[1])
