"""Check dotted config keys and the types of their values, with suggestions for misspelled keys."""

from __future__ import annotations

import difflib
import itertools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import yaml

from launch.config.other_names import OTHER_NAMES
from launch.config.yaml_text import check_yaml

_MOST_BITS = 63
"""Bits of the largest whole number; floats hold no more than 1024."""
_SHOWN = 120
"""Characters of a value that a message shows."""
_KEY = re.compile(r"\b\w+(\.\w+)+")
"""A dotted key in a message."""
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    Any: "any value",
    type(None): "null",
}


def leaves(tree: Mapping[str, Any], root: type, source: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every field that `tree` sets.

    Raises:
        ValueError: a key that the dataclass `root` does not have, or a value instead of a section.
    """

    def walk(node: Mapping[str, Any], section: type, prefix: str) -> Iterator[tuple[str, Any]]:
        hints = field_types(section)
        for name, value in node.items():
            key = f"{prefix}{name}"
            if name not in hints:
                raise ValueError(_unknown(key, source, root))
            inner = hints[name]
            if _holds_text(inner) and isinstance(value, Mapping):
                yield from ((f"{key}.{item}", text) for item, text in value.items())
            elif not is_dataclass(inner):
                yield key, value
            elif isinstance(value, Mapping):
                yield from walk(value, typing.cast(type, inner), f"{key}.")
            elif value is not None:
                raise ValueError(_not_a_value(key, value, inner, source))

    return walk(tree, root, "")


def parse_override(text: str, config_type: type) -> tuple[str, Any]:
    """Split a `key=value` argument and read its value according to the type of the field.

    The value of a text field is used as typed, so quotes, spaces, `$` and `:` need no escape beyond
    the shell's. All other values are YAML: `null`, `3`, `1e-3`, `[a, b]`.

    Raises:
        ValueError: no `=`, an unknown key, or a section instead of a key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(
            f"{text!r} on the command line is not a setting; write key=value, as in optim.lr=1e-3"
        )
    key = key.strip()
    source = "on the command line"
    hint = _hint(config_type, key)
    if hint is None:
        raise ValueError(_unknown(key, source, config_type))
    if is_dataclass(hint):
        raise ValueError(_not_a_value(key, value, hint, source))
    return key, _read_value(key, value, hint)


def whole_number(value: object, config_type: type, key: str) -> object:
    """Return a value such as 4e9, a float or text in YAML, as an int if `key` is an int field."""
    hint = _hint(config_type, key)
    if int not in (hint, *typing.get_args(hint)) or not isinstance(value, str | float):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() else value


def field_types(config_type: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass, without what belongs to the class alone."""
    types = typing.get_type_hints(config_type)
    return {item.name: types[item.name] for item in fields(config_type)}


def has_key(config_type: type, key: str) -> bool:
    """Return whether a dotted key names a field or a section."""
    return _hint(config_type, key) is not None


def check_numbers(key: str, value: object, source: str) -> None:
    """Raise ValueError if a value, or a part of it, is a whole number beyond 64 bits."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        digits = round(value.bit_length() * math.log10(2))
        raise ValueError(
            f"{key} is a number of about {digits:,} digits ({source}); whole numbers go up to "
            f"{2**_MOST_BITS - 1}: write a smaller one"
        )
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            check_numbers(key, item, source)


def shown(value: object) -> str:
    """Return a value as messages show it: its `repr`, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


def expected_type(config_type: type, key: str) -> str:
    """Describe the type of the field `key` in words."""
    return _describe(_hint(config_type, key))


def _read_value(key: str, text: str, hint: object) -> object:
    is_text = typing.get_origin(hint) is not list and str in (hint, *typing.get_args(hint))
    try:
        check_yaml(text, f"{key} on the command line")
    except yaml.YAMLError:
        return text  # globs such as *.tar or {0..9}.tar are not YAML
    try:
        parsed = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError):  # a date of no calendar, too many digits
        return text
    if parsed is None:
        return None
    if hint is object or typing.get_origin(hint) is dict:
        return _with_numbers(parsed)
    # A glob or brace list may also be valid YAML, a mapping or a tag. No field for globs has the
    # type Any, so only lists are read as YAML there.
    if is_text or (hint is Any and not isinstance(parsed, list | int)):
        return text
    return parsed


def _with_numbers(value: object) -> object:
    """Read 1e-5 as a number: YAML 1.1 requires a point in it, and the field has no type."""
    if isinstance(value, dict):
        return {name: _with_numbers(item) for name, item in value.items()}
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value


def _hint(config_type: type, key: str) -> object:
    """Return the type of a dotted key, or None if the key does not exist."""
    hint: object = config_type
    for name in key.split("."):
        if typing.get_origin(hint) is dict:
            return str if _holds_text(hint) else object  # any item of the mapping
        if not is_dataclass(hint):
            return None
        hint = field_types(typing.cast(type, hint)).get(name)
    return hint


def _holds_text(hint: object) -> bool:
    """Return whether the type maps names to text, such as variables, which files may add to."""
    return typing.get_origin(hint) is dict and typing.get_args(hint) == (str, str)


def _describe(hint: object) -> str:
    if hint in _TYPE_NAMES:
        return _TYPE_NAMES[hint]
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_describe(argument) for argument in arguments)
    if typing.get_origin(hint) is dict:
        return "a mapping"
    if typing.get_origin(hint) is list:
        return f"a list, each {_describe(arguments[0])}"
    if typing.get_origin(hint) is tuple:
        return f"a list of {len(arguments)}, each {_describe(arguments[0])}"
    return "another type"


def _keys(config_type: type, prefix: str = "") -> Iterator[str]:
    for name, hint in field_types(config_type).items():
        yield f"{prefix}{name}"
        if is_dataclass(hint):
            yield from _keys(typing.cast(type, hint), f"{prefix}{name}.")


def _not_a_value(key: str, value: object, section: object, source: str) -> str:
    example = next(iter(field_types(typing.cast(type, section))))
    return (
        f"{key} is a section, but {source} it is set to {value!r}; "
        f"set its keys, such as {key}.{example}"
    )


def _unknown(key: str, source: str, root: type) -> str:
    message = f"unknown config key {key} ({source})"
    known = list(_keys(root))
    section, _, ending = key.rpartition(".")
    inside = _hint(root, section) if section else root
    siblings = list(field_types(typing.cast(type, inside))) if is_dataclass(inside) else []
    same_ending = [name for name in known if name.rpartition(".")[2] == ending]
    similar = difflib.get_close_matches(ending, siblings, n=1)
    if ending in OTHER_NAMES:
        return f"{message}: {_KEY.sub(lambda m: _nearby(m[0], key, known), OTHER_NAMES[ending])}"
    if same_ending:
        return f"{message}; did you mean {_closest(same_ending, key)}?"
    if similar:
        return f"{message}; did you mean {section}{'.' if section else ''}{similar[0]}?"
    if siblings:
        return f"{message}; {section or 'a config'} has {', '.join(siblings)}"
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
    return f"{message}; the nearest is {nearest}"


def _nearby(said: str, key: str, known: list[str]) -> str:
    """Return the key that is to the section of `key` as `said` is to the first part of its own.

    The settings of data.augment are those of data.local.augment too, for example.
    """
    tail = said.partition(".")[2]
    alike = [name for name in known if name.endswith(f".{tail}")]
    return _closest([said, *alike], key)


def _closest(names: list[str], key: str) -> str:
    """Return the name that begins with most of the sections of `key`; the first of several."""

    def shared(name: str) -> int:
        pairs = zip(name.split("."), key.split("."), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    return max(names, key=shared)
