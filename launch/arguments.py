"""The parser of the command line, and arguments that several commands declare in the same way."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from zeta.files import local_path

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Type of the result of `add_subparsers`, which argparse does not name publicly."""


def add_command(
    subparsers: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    """Declare a command: `run` executes it, `summary` and `example` are its help."""
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    """Declare CONFIG and its `key=value` settings."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file or name of a shipped recipe")
    add_settings(parser, "CONFIG")


def add_settings(parser: argparse.ArgumentParser, changed: str) -> None:
    """Declare `key=value` settings, apart from arguments and options.

    Args:
        parser: the command.
        changed: the thing whose values they change, in the help.
    """
    group = parser.add_argument_group("settings", "any number of them, before or after options")
    group.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help=f"value in place of that of {changed}, as in train.max_steps=500; `zeta config` lists "
        "the recipes, `zeta config RECIPE` all settings of one",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declare --json."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )


def positive_int(text: str) -> int:
    """Read an argument that must be a whole number of at least 1."""
    return _whole_number(text, 1)


def non_negative_int(text: str) -> int:
    """Read an argument that must be a whole number of at least 0."""
    return _whole_number(text, 0)


def positive_number(text: str) -> float:
    """Read an argument that must be a number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def _whole_number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def size_mb(text: str) -> float:
    """Read a size such as 512MB or 2GB (powers of ten); return it in MB."""
    number, unit = text[:-2], text[-2:].lower()
    factor = {"kb": 1e-3, "mb": 1.0, "gb": 1e3}.get(unit)
    if factor is None or not re.fullmatch(r"\d+(\.\d+)?", number) or float(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512MB or 2GB")
    return float(number) * factor


def input_path(text: str) -> Path:
    """Read an argument that names a file or folder to read, with `~` expanded."""
    return Path(expanded(text))


def expanded(text: str) -> str:
    """Return a path, glob or URL with a leading `~` expanded; that of an unknown user stays.

    An empty one, as a variable that is not set leaves it, would be the current folder.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give a path (for the current folder, .)")
    return os.path.expanduser(text)  # noqa: PTH111 - pathlib makes one slash of a URL's two


def output_path(text: str) -> Path:
    """Read an argument that names a file or folder to write, see `zeta.files.local_path`."""
    try:
        return local_path(text, "it")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_shards(parser: argparse.ArgumentParser) -> None:
    """Declare SHARDS."""
    parser.add_argument(
        "shards",
        metavar="SHARDS",
        nargs="+",
        help="folders, .tar files, globs, brace expansions or URLs",
    )


def add_export(parser: argparse.ArgumentParser) -> None:
    """Declare the model of a command, EXPORT."""
    parser.add_argument(
        "export",
        metavar="EXPORT",
        type=input_path,
        help="folder from zeta export, or of any encoder that zeta import takes",
    )


def add_images(parser: argparse.ArgumentParser) -> None:
    """Declare IMAGES."""
    parser.add_argument(
        "images",
        metavar="IMAGES",
        type=expanded,
        nargs="+",
        help="folders of images, image files, .csv or .jsonl tables of paths; or shards",
    )


def add_size(parser: argparse.ArgumentParser) -> None:
    """Declare --resolution and --tokens: the one size at which images are shown to the model."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--resolution",
        default="train",
        metavar="SIZE",
        help="train (at most as large as in training), native (each image at its own size), or a "
        "side s in pixels, for the area s*s (default: train)",
    )
    size.add_argument(
        "--tokens", type=positive_int, metavar="N", help="shrink larger images to N patches"
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Declare --workers."""
    parser.add_argument(
        "--workers",
        type=positive_int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: the cores of this machine)",
    )


def add_evaluation_ranks(parser: argparse.ArgumentParser) -> None:
    """Declare --workers and --nproc of a command that any number of ranks may share."""
    parser.add_argument(
        "--workers",
        type=non_negative_int,
        default=2,
        metavar="N",
        help="decoding processes of a rank (default: 2)",
    )
    parser.add_argument(
        "--nproc",
        type=positive_int,
        default=1,
        metavar="N",
        help="ranks to start on this machine; they change nothing but the speed (default: 1)",
    )


class Parser(argparse.ArgumentParser):
    """The parser of `zeta` and of each of its commands."""

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Exit with status 2 and a message about words that are no arguments of the command."""
        word = next((word for word in words if word.startswith("-")), words[0])
        if not word.startswith("-"):
            self.error(f"unrecognized arguments: {' '.join(words)}")
        options = [option for action in self._actions for option in action.option_strings]
        name = word.partition("=")[0]
        self.error(
            f"no option {name}{_nearest(name, options)}: `{self.prog} --help` lists the options"
        )

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a command that does not exist, by the nearest name; else as argparse does."""
        choices = action.choices
        if isinstance(action, argparse._SubParsersAction) and value not in (choices or ()):
            names = list(choices or ())
            raise argparse.ArgumentError(
                None, f"no command {value!r}{_nearest(value, names)}: there are {', '.join(names)}"
            )
        super()._check_value(action, value)


class ShowVersion(argparse.Action):
    """Print the versions that a report of a problem needs, and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, **rest: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **rest)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        """Print zeta, torch, DeepSpeed and Python, without loading any of them."""
        from platform import python_version

        parts = [f"{name} {_version(name)}" for name in ("zeta", "torch", "deepspeed")]
        print(f"{', '.join(parts)}, python {python_version()}")
        parser.exit()


def _version(package: str) -> str:
    from importlib import metadata  # only here: --help answers at once

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _nearest(word: str, known: Iterable[str]) -> str:
    import difflib  # only here: --help answers at once

    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
