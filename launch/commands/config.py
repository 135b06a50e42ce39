"""`zeta config`: which recipes exist, and which values one gives."""

from __future__ import annotations

import argparse

from launch.arguments import Subparsers, add_command, add_settings


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "config",
        run,
        "list the recipes, or print every value of one with its meaning and its source",
        "zeta config first_run train.max_steps=500 > my_recipe.yaml",
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        help="YAML file or name of a shipped recipe (default: list the shipped recipes)",
    )
    add_settings(parser, "CONFIG")
    parser.add_argument(
        "--markdown",
        action="store_true",
        help="print the reference of all settings instead, as in docs/config.md",
    )


def run(args: argparse.Namespace) -> int:
    """Print the list of recipes, one resolved config, or the reference."""
    from launch.config.describe import config_yaml, markdown, recipe_lines

    if args.markdown and args.config is not None:
        raise ValueError("--markdown prints all settings: leave CONFIG out")
    if args.markdown:
        print(markdown(), end="")
    elif args.config is None:
        print("\n".join(recipe_lines()))
        print("\n`zeta config RECIPE` prints all values of a recipe, and where each comes from.")
    else:
        print(config_yaml(args.config, args.overrides), end="")
    return 0
