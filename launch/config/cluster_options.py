"""The options of `zeta launch slurm` and `doctor` that set values of `cluster.*`."""

from __future__ import annotations

import argparse

from launch.arguments import positive_int

_TEXT = {
    "nodes": (
        "N|MIN-MAX",
        "number of nodes; with a range, all free nodes in it, and fewer after one has failed",
    ),
    "partition": ("NAME", "partition"),
    "account": ("NAME", "account"),
    "qos": ("NAME", "quality of service"),
    "time": ("TIME", "time limit of one job: HH:MM:SS, D-HH:MM:SS, or minutes"),
    "mem": ("SIZE", "memory of a node, as in 200G; 0: all of it"),
    "constraint": ("FEATURES", "features that nodes must have"),
    "exclude": ("NODES", "nodes to avoid"),
}
_COUNTS = {
    "gpus_per_node": ("G", "GPUs of a node, each with one rank"),
    "tasks_per_node": ("T", "ranks of a node that trains on CPUs"),
    "cpus_per_task": ("C", "cores of a rank and its loader workers"),
}


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    group = parser.add_argument_group("request to Slurm (also settings, cluster.* of CONFIG)")
    for name, (metavar, about) in _TEXT.items():
        group.add_argument(_flag(name), metavar=metavar, help=about)
    for name, (metavar, about) in _COUNTS.items():
        group.add_argument(_flag(name), type=positive_int, metavar=metavar, help=about)
    group.add_argument(
        "--container",
        metavar="IMAGE",
        help="container image of the ranks: run by apptainer if it ends in .sif, else by pyxis",
    )
    group.add_argument(
        "--cluster",
        metavar="NAME",
        help="name of a file in configs/cluster/, or your own YAML file, instead of the recipe's",
    )


def with_cluster_settings(args: argparse.Namespace) -> list[str]:
    """Return the settings of the command line, with the options added as settings.

    The ranks and a later start thus read the same config.
    """
    settings = list(args.overrides)
    if args.cluster is not None:
        settings.append(f"cluster={args.cluster}")
    for name in (*_TEXT, *_COUNTS):
        value = getattr(args, name)
        if value is not None:
            # Slurm reads a bare number as minutes, and YAML reads 24:00:00 as a number.
            bare_minutes = name == "time" and value.isdecimal()
            settings.append(f"cluster.{name}={value}{':00' if bare_minutes else ''}")
    if args.container is not None:
        settings.append(f"cluster.container.image={args.container}")
    return settings


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
