"""`zeta launch slurm`: submit a run to a Slurm cluster."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from launch.arguments import Subparsers, add_command, add_config, add_json, positive_int

_TEXT = {
    "nodes": ("N|MIN-MAX", "nodes; of a range, as many as are free, and fewer once one failed"),
    "partition": ("NAME", "partition"),
    "account": ("NAME", "account"),
    "qos": ("NAME", "quality of service"),
    "time": ("TIME", "longest time of one start: HH:MM:SS, D-HH:MM:SS, or minutes"),
    "mem": ("SIZE", "memory of a node, as in 200G; 0: all of it"),
    "constraint": ("FEATURES", "features that nodes must have"),
    "exclude": ("NODES", "nodes to avoid"),
}
_COUNTS = {
    "gpus_per_node": ("G", "GPUs of a node, each with one rank"),
    "tasks_per_node": ("T", "ranks of a node, where they train on CPUs"),
    "cpus_per_task": ("C", "cores of a rank and its loader workers"),
}


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "slurm",
        run,
        "submit a run to Slurm; the options are also settings cluster.* of CONFIG",
        "zeta launch slurm navit_b16_classification --nodes 2 --gpus-per-node 8 \\\n"
        "    --partition gpus --time 24:00:00 data.shards=/data/train run.dir=/shared/b16",
    )
    add_config(parser)
    for name, (metavar, about) in _TEXT.items():
        parser.add_argument(_flag(name), metavar=metavar, help=about)
    for name, (metavar, about) in _COUNTS.items():
        parser.add_argument(_flag(name), type=positive_int, metavar=metavar, help=about)
    parser.add_argument(
        "--container",
        metavar="IMAGE",
        help="image that the ranks run in: by apptainer where it ends in .sif, else by pyxis",
    )
    parser.add_argument(
        "--cluster",
        metavar="NAME",
        help="piece of configs/cluster/, or a YAML file of your own, instead of the recipe's",
    )
    parser.add_argument(
        "--chain",
        type=positive_int,
        metavar="K",
        help="where jobs cannot be requeued: K jobs, one after another, until the run is finished",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print command and script, submit nothing"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Check the run as its ranks would, submit it, and say how to follow it."""
    from launch.config import load_config
    from launch.submission import submit_run  # with it comes torch

    overrides = [*args.overrides, *_settings(args)]
    if args.container is not None:
        if load_config(args.config, overrides).cluster.container.kind == "none":
            kind = "apptainer" if args.container.endswith(".sif") else "pyxis"
            overrides.append(f"cluster.container.kind={kind}")
        overrides.append(f"cluster.container.image={args.container}")
    return submit_run(
        args.config, overrides, chain=args.chain, dry_run=args.dry_run, as_json=args.json
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _settings(args: argparse.Namespace) -> Iterator[str]:
    """Yield the options as settings, so that the ranks and a later start see the same config."""
    if args.cluster is not None:
        yield f"cluster={args.cluster}"
    for name in (*_TEXT, *_COUNTS):
        value = getattr(args, name)
        if value is not None:
            # To Slurm a bare number is minutes, and to YAML 24:00 another one.
            bare_minutes = name == "time" and value.isdecimal()
            yield f"cluster.{name}={value}{':00' if bare_minutes else ''}"
