"""The `zeta` command line.

Each command is a module of `launch.commands` with `add_parser(subparsers)`, which declares its
arguments and sets `run`, and `run(args) -> int`, which imports what it needs: `zeta --help` is fast
because no command loads torch before it runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

from data_pipeline.config import DataWarning
from launch import errors
from launch.arguments import Parser, ShowVersion

Run = Callable[[argparse.Namespace], int]


class Command(NamedTuple):
    """A module of launch.commands, and the group of commands in whose folder it is, if any."""

    module: str
    group: str = ""


GROUPS = {
    "shards": "write, index and check WebDataset shards",
    "data": "plan, measure and audit the data of a run",
    "launch": "start training, and follow it",
}
COMMANDS = (
    Command("demo"),
    Command("config"),
    Command("write", "shards"),
    Command("shrink", "shards"),
    Command("verify", "shards"),
    Command("stats", "shards"),
    Command("plan", "data"),
    Command("bench", "data"),
    Command("audit", "data"),
    Command("train"),
    Command("local", "launch"),
    Command("slurm", "launch"),
    Command("doctor", "launch"),
    Command("check", "launch"),
    Command("sizes", "launch"),
    Command("preflight", "launch"),
    Command("status", "launch"),
    Command("watch", "launch"),
    Command("wandb_sync"),
    Command("finetune"),
    Command("export"),
    Command("import_encoder"),
    Command("evaluate"),
    Command("predict"),
    Command("embed"),
    Command("report"),
    Command("experiment"),
    Command("completion"),
)


def entry_point(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; user errors are one message on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words  # before or after the command
    args = parse_arguments([word for word in words if word != "--debug"])
    run: Run = args.run
    warnings.formatwarning = _one_line
    try:
        return run(args)
    except BrokenPipeError:  # the reader, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.FAILED
    except (KeyboardInterrupt, *errors.USER_ERRORS) as error:
        if debug:
            raise
        in_training = args.command in ("train", "launch", "finetune")
        if not isinstance(error, KeyboardInterrupt):
            print(f"zeta: error: {errors.message(error)}", file=sys.stderr)
        elif (
            os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
        ):  # one rank prints it
            how = "; the same command continues from the last checkpoint, if any"
            print(f"zeta: interrupted{how if in_training else ''}", file=sys.stderr)
        return errors.exit_code(error, in_training=in_training)


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: object = None
) -> str:
    """Return a warning about the user's data as one line, and any other as Python shows it."""
    if issubclass(category, DataWarning):
        return f"zeta: warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments; `key=value` settings may come before or after options.

    Wrong usage exits with status 2, as in argparse.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(words)
    args.whole_parser = parser
    # If an option follows CONFIG, argparse accepts no settings after it.
    if rest and ("overrides" not in args or any(word.startswith("-") for word in rest)):
        args.parser.refuse(rest)
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def build_parser() -> Parser:
    """Return the parser of the whole command line."""
    parser = Parser(
        prog="zeta",
        description="Native-resolution Vision Transformer pretraining.",
        epilog="example: zeta demo",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action=ShowVersion, help="print the versions and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    groups = {"": commands}
    for module_name, group in COMMANDS:
        if group not in groups:
            group_parser = commands.add_parser(
                group, help=GROUPS[group], description=GROUPS[group].capitalize() + "."
            )
            groups[group] = group_parser.add_subparsers(
                dest="subcommand", metavar="COMMAND", required=True
            )
        module = ".".join(filter(None, ("launch.commands", group, module_name)))
        importlib.import_module(module).add_parser(groups[group])
    return parser
