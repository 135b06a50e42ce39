"""An argument parser that answers a wrong command or option with the nearest that there is."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


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
