"""`zeta completion`: print the script with which a shell completes zeta's commands."""

from __future__ import annotations

import argparse

from launch.arguments import Subparsers, add_command


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "completion",
        run,
        "print a script that lets bash or zsh complete commands, options, recipes and settings",
        "source <(zeta completion bash)   # in ~/.bashrc",
    )
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh"), help="bash or zsh")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    from launch.cli import build_parser
    from launch.completion import completion_script

    print(completion_script(build_parser(), args.shell), end="")
    return 0
