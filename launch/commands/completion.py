"""`zeta completion`: print the script with which a shell completes zeta's commands."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from launch.arguments import Subparsers, add_command

SHELLS = ("bash", "zsh")

_SCRIPT = """\
# Completion of zeta. Add to ~/.bashrc or ~/.zshrc:  source <(zeta completion {shell})
{head}_zeta_keys="{keys}"
_zeta_words() {{
  case "$1" in
{cases}
  esac
}}
_zeta() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" path="" word
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "$path $word" in
      {paths}) path="$path $word" ;;
    esac
  done
  COMPREPLY=($(compgen -W "$(_zeta_words "$path")" -- "$current"))
  # A key of a setting waits for its value.
  [[ ${{#COMPREPLY[@]}} -eq 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2>/dev/null
  return 0
}}
complete -o default -F _zeta zeta
"""
_HEADS = {"bash": "", "zsh": "autoload -U +X bashcompinit && bashcompinit\n"}


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "completion",
        run,
        "print a script that lets bash or zsh complete commands, options, recipes and settings",
        "source <(zeta completion bash)   # in ~/.bashrc",
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash or zsh")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    print(completion_script(args.whole_parser, args.shell), end="")
    return 0


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script for a shell; paths are completed by the shell itself.

    Args:
        parser: the parser of the whole command line.
        shell: one of `SHELLS`.
    """
    from launch.config.fields import config_fields

    keys = " ".join(f"{field.key}=" for field in config_fields())
    words = {path: _words(each) for path, each in _parsers(parser, "")}
    cases = [f'    "{path}") echo "{" ".join(found)}" ;;' for path, found in words.items()]
    paths = "|".join(f'"{path}"' for path in words if path)
    listed = "\n".join(cases)
    return _SCRIPT.format(shell=shell, head=_HEADS[shell], keys=keys, cases=listed, paths=paths)


def _parsers(
    parser: argparse.ArgumentParser, path: str
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield each parser by the commands that lead to it, each after a space."""
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from _parsers(inner, f"{path} {name}")


def _words(parser: argparse.ArgumentParser) -> list[str]:
    """Return the words that may follow: commands, options, recipes and keys of settings."""
    from launch.shipped import recipe_names

    found: list[str] = []
    for action in parser._actions:
        found += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            found += action.choices
        elif action.dest == "config":
            found += recipe_names()
        elif action.dest == "overrides":
            found.append("$_zeta_keys")
        elif action.choices is not None:
            found += map(str, action.choices)
    return found
