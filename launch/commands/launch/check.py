"""`zeta launch check`: check a config, and name its run directory."""

from __future__ import annotations

import argparse
from math import ceil
from typing import TYPE_CHECKING

from launch.arguments import Subparsers, add_command, add_config

if TYPE_CHECKING:
    from launch.config.load import ZetaConfig


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "check",
        run,
        "check a config without starting anything, and print its run directory",
        "zeta launch check navit_b16_classification data.shards=shards/train",
    )
    add_config(parser)
    parser.add_argument(
        "--for-script",
        action="store_true",
        help="print what slurm/pretrain.sbatch reads instead: KIND:WORD, each ended by a NUL",
    )


def run(args: argparse.Namespace) -> int:
    """Print the run directory, or everything that slurm/pretrain.sbatch reads."""
    from launch.config.destinations import check_destinations
    from launch.config.load import load_config
    from launch.config.resolve import check_named

    config = load_config(args.config, args.overrides)
    check_named(config)
    check_destinations(config)
    if args.for_script:
        print(*(f"{word}\0" for word in script_words(config)), sep="", end="")
    else:
        print(config.run.dir)
    return 0


def script_words(config: ZetaConfig) -> list[str]:
    """Return the words that the batch script takes from a config, each after its kind.

    ``run_dir:DIR``, ``env:NAME=VALUE``, ``srun:OPTION``, ``wrap:WORD`` (of the command in front of
    `zeta`) and ``preflight:SECONDS`` if the nodes are to be checked: it takes less.
    """
    from launch.config.destinations import run_directory

    cluster = config.cluster
    container = cluster.container
    return [
        f"run_dir:{run_directory(config).path}",
        *(f"env:{name}={value}" for name, value in cluster.environment.items()),
        *(f"srun:{word}" for word in container.srun_options(list(cluster.environment))),
        *(f"wrap:{word}" for word in container.command_prefix(gpus=config.train.device != "cpu")),
        *([f"preflight:{ceil(cluster.preflight_limit_s)}"] if cluster.preflight else []),
    ]
